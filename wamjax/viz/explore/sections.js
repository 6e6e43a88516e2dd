// ---- noising ----

function noising(section) {
  const groups = DATA.noising;
  if (!groups.length) return;
  let group = groups[0];
  const picture = element("div", { class: "stage" });
  const facts = element("p", { class: "facts", "aria-live": "polite" });
  const curve = element("div");
  const player = new Player(section, group.levels.length, show);
  section.append(choice("group", groups.map((g) => g.group), (i) => {
    group = groups[i];
    player.reset(group.levels.length, Math.min(player.step, group.levels.length - 1));
  }), player.node, facts, picture, curve);
  player.reset(group.levels.length, Math.floor(group.levels.length / 2));

  function show(step) {
    const [level, alpha, sigma] = [group.levels[step], group.alpha[step], group.sigma[step]];
    facts.textContent = `level ${number(level)}:  x = ${number(alpha)} · data + ` +
      `${number(sigma)} · noise;  weight in the loss ${number(group.weight[step])}, ` +
      `the network is told ${number(group.told[step])}`;
    const now = group.steps[step] ?? {};
    picture.replaceChildren(...(now.values ? [lines(now.values, group.reach)] : [
      now.picture ? figure(now.picture, "decoded") : null,
      now.latent ? figure(now.latent, "the latent, its three principal channels") : null,
    ].filter(Boolean)));
    curve.replaceChildren(path(group, step));
  }
}

function lines(values, reach) {
  const [w, h] = [600, 180];
  const dims = values[0].length;
  const y = (v) => h / 2 - Math.max(-1.4, Math.min(1.4, v / reach)) * h / 3;
  const x = (i) => values.length > 1 ? i * (w - 20) / (values.length - 1) + 10 : w / 2;
  const parts = [shape("line", { x1: 0, x2: w, y1: h / 2, y2: h / 2, class: "axis" })];
  for (let d = 0; d < dims; d += 1) {
    const points = values.map((row, i) => `${x(i)},${y(row[d])}`).join(" ");
    parts.push(shape("polyline", { points, class: `series s${d % 6}` }));
    values.forEach((row, i) => parts.push(
      shape("circle", { cx: x(i), cy: y(row[d]), r: 3, class: `dot s${d % 6}` })));
  }
  return shape("svg", { viewBox: `0 0 ${w} ${h}`, class: "plot" }, ...parts);
}

function path(group, step) {
  const [w, h, n] = [600, 130, group.levels.length];
  const most = Math.max(...group.sigma, ...group.alpha, 1e-9);
  const x = (i) => 10 + i * (w - 20) / Math.max(n - 1, 1);
  const y = (v) => h - 18 - v / most * (h - 30);
  const line = (values, kind) => shape("polyline",
    { points: values.map((v, i) => `${x(i)},${y(v)}`).join(" "), class: `series ${kind}` });
  return shape("svg", { viewBox: `0 0 ${w} ${h}`, class: "plot", role: "img",
    "aria-label": "share of data and of noise at each level" },
    shape("line", { x1: x(step), x2: x(step), y1: 6, y2: h - 16, class: "cursor" }),
    line(group.alpha, "s0"), line(group.sigma, "s1"),
    shape("text", { x: 12, y: h - 3, class: "key s0" }, "— data"),
    shape("text", { x: 80, y: h - 3, class: "key s1" }, "— noise"),
    shape("text", { x: w - 10, y: h - 3, "text-anchor": "end", class: "key" },
      "sampling goes to the right"));
}

// ---- autoregression and diffusion ----

function schemes(section) {
  const all = DATA.schemes;
  let scheme = all[0];
  const words = element("p", { class: "facts", "aria-live": "polite" });
  const about = element("p", { class: "note" });
  const frames = element("div", { class: "frames" });
  const seen = element("canvas", { class: "mask small" });
  const player = new Player(section, count(), show, 250);
  section.append(choice("scheme", all.map((s) => s.name), (i) => {
    scheme = all[i];
    player.stop();
    player.reset(count());
  }), about, player.node, words, frames, legend([["data", "given or made"], ["cache", "in the cache"],
    ["now", "computed now"], ["wait", "not there yet"]]),
  element("h3", {}, "who sees whom: computed rows in colour"), seen);
  player.reset(count());

  function count() { return scheme.tokens ? 2 + scheme.frames * scheme.tokens : scheme.passes.length + 1; }

  function state(step) {
    if (!scheme.tokens) {
      if (step === scheme.passes.length) {
        return { noise: Array(scheme.frames).fill(0), now: [], cache: [], text: "done" };
      }
      return scheme.passes[step];
    }
    // Pass 0 reads the prefix; each further one makes a token of the one before.
    const made = Math.max(0, step - 1), done = Math.floor(made / scheme.tokens);
    const end = step === count() - 1;
    return {
      noise: [...Array(scheme.frames).keys()].map((i) => i < done ? 0 : i === done && !end ? null : null),
      now: end ? [] : [Math.min(done, scheme.frames - 1)],
      cache: [...Array(scheme.frames).keys()].filter((i) => i < done),
      part: (made % scheme.tokens) / scheme.tokens, made,
      text: end ? "done" : step === 0 ? "prefill: the prefix" : `token ${made + 1} of ${scheme.frames * scheme.tokens}`,
    };
  }

  function show(step) {
    const now = state(step);
    const passes = scheme.tokens ? count() - 1 : scheme.passes.length;
    about.textContent = `${scheme.text} ${plural(passes, "evaluation")} of the network for ` +
      `${plural(scheme.frames, "latent frame")}.`;
    words.textContent = now.text;
    frames.replaceChildren(...now.noise.map((noise, i) => frame(noise, i, now)));
    drawFrames(seen, scheme, now);
  }

  function frame(noise, i, now) {
    const kind = now.cache.includes(i) ? "cache" : now.now.includes(i) ? "now" : noise === 0 ? "data" : "wait";
    const canvas = element("canvas", { width: 16, height: 16 });
    speckle(canvas, now.part !== undefined && now.now.includes(i) ? null : noise, now.part, i);
    const text = noise === null ? "" : noise === 0 ? "data" : `noise ${number(noise, 2)}`;
    return element("figure", { class: `frame ${kind}` }, canvas, element("figcaption", {},
      `${i}`, element("br"), text || " "));
  }
}

function drawFrames(canvas, scheme, now) {
  const n = scheme.frames, cell = Math.max(8, Math.min(36, Math.floor(320 / n)));
  const rows = unfold(scheme.mask);
  canvas.width = canvas.height = n * cell;
  canvas.style.maxWidth = `${n * cell}px`;
  const context = canvas.getContext("2d"), ink = colours();
  for (let q = 0; q < n; q += 1) {
    for (let k = 0; k < n; k += 1) {
      const active = now.now.includes(q);
      context.fillStyle = !rows[q][k] ? ink.panel : !active ? ink.line
        : now.cache.includes(k) ? ink.good : ink.warm;
      context.fillRect(k * cell, q * cell, cell - 1, cell - 1);
    }
  }
}

// ---- slots ----

function slots(section) {
  const { names, uses } = DATA.slots;
  if (!uses.length) return;
  const say = element("p", { class: "facts", "aria-live": "polite" }, "");
  const rows = uses.map((use, u) => element("tr", {}, element("th", { scope: "row" }, use.name),
    ...use.states.map((state, i) => element("td", { class: `slot ${state}`, tabindex: -1,
      onclick: () => { player.move(u - player.step); tell(u, i); } }, state))));
  const head = element("tr", {}, element("th"), ...names.map(([name]) =>
    element("th", { scope: "col" }, name)));
  section.append(element("div", { class: "wide" }, element("table", { class: "slots" }, head, ...rows)),
    legend([["given", "given: clean, no loss"], ["predicted", "predicted: noised, has a loss"],
      ["hidden", "hidden: noised, no loss"], ["absent", "absent: not computed"]]), say);
  const player = new Player(section, uses.length, (u) => tell(u, null), 900);
  section.insertBefore(player.node, section.querySelector(".wide"));

  function tell(u, i) {
    rows.forEach((row, j) => row.classList.toggle("chosen", j === u));
    const use = uses[u];
    const given = names.filter((_, j) => use.states[j] === "given").map(([name]) => name);
    const made = names.filter((_, j) => ["predicted", "hidden"].includes(use.states[j]))
      .map(([name]) => name);
    const start = i === null ? "" : `${names[i][0]}, of group ${names[i][1]}, is ${use.states[i]} in ${use.name}. `;
    say.textContent = `${start}${use.name}: p( ${shorten(made)} | ${shorten(given)} ), table ${use.table}`;
  }
  player.reset(uses.length);
}

// ---- visibility ----

function tables(section) {
  const all = DATA.tables;
  let table = all[0], rows, size, edges;
  const canvas = element("canvas", { class: "mask" });
  const about = element("p", { class: "note" });
  const say = element("p", { class: "facts", "aria-live": "polite" });
  const keeps = element("p", {});
  const player = new Player(section, 1, (step) => draw(step), 200);
  section.append(choice("table", all.map((t) => t.use), (i) => { table = all[i]; open(); }), about,
    player.node, say, canvas, legend([["now", "attends, the chosen row"], ["seen", "attends"],
      ["cache", "attends what the cache keeps"]]), keeps);
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  open();

  function open() {
    rows = unfold(table.mask);
    size = rows.length;
    edges = [0];
    for (const cells of table.cells) edges.push(edges[edges.length - 1] + cells);
    const total = table.tokens.reduce((sum, tokens) => sum + tokens, 0);
    canvas.width = canvas.height = size * scale();
    canvas.style.imageRendering = "pixelated";
    about.textContent = `${table.name}: ${table.groups.map((g, i) =>
      `${g} ${plural(table.tokens[i], "token")}`).join(", ")}; ${number(100 * table.share)} % of ` +
      `${total} × ${total} pairs attended.` +
      (table.each > 1 ? ` A cell is about ${table.each} × ${table.each} tokens.` : "");
    keeps.textContent = !table.given.length
      ? "Nothing is given at the start. What was made is given to what comes after, and is cached " +
        "where it sees nothing that still changes."
      : table.keeps.length ? `While the others are denoised, the keys and values of ${listed(table.keeps)} cannot change: ` +
        "they are given, and see only what is given. They are computed once."
      : "Nothing stays constant while the others are denoised: every given group sees what changes. " +
        "Nothing is cached but the text.";
    player.reset(size, Math.floor(size / 2));
  }

  function scale() { return Math.max(1, Math.floor(700 / size)); }

  function draw(q) {
    const context = canvas.getContext("2d"), ink = colours(), cell = scale();
    const kept = new Uint8Array(size);
    table.groups.forEach((g, i) => { if (table.keeps.includes(g)) kept.fill(1, edges[i], edges[i + 1]); });
    context.fillStyle = ink.panel;
    context.fillRect(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < size; i += 1) {
      for (let k = 0; k < size;) {
        let stop = k + 1;
        while (stop < size && rows[i][stop] === rows[i][k] && kept[stop] === kept[k]) stop += 1;
        if (rows[i][k]) {
          context.fillStyle = i === q ? ink.warm : kept[k] ? ink.good : ink.accent;
          context.fillRect(k * cell, i * cell, (stop - k) * cell, cell);
        }
        k = stop;
      }
    }
    context.fillStyle = ink.paper;
    for (const edge of edges.slice(1, -1)) {
      const line = Math.max(1, Math.ceil(canvas.width / 350));
      context.fillRect(edge * cell, 0, line, canvas.height);
      context.fillRect(0, edge * cell, canvas.width, line);
    }
    const letters = Math.round(canvas.width / 45);
    context.font = `${letters}px system-ui, sans-serif`;
    table.groups.forEach((group, i) => {  // names on the diagonal, where they fit
      const side = table.cells[i] * cell;
      if (side < 1.3 * letters || side < context.measureText(group).width + letters) return;
      context.fillStyle = rows[edges[i + 1] - 1][edges[i]] ? ink.paper : ink.ink;
      context.fillText(group, edges[i] * cell + letters / 2, edges[i + 1] * cell - letters / 2);
    });
    tell(q, null);
  }

  function tell(q, k) {
    const to = table.groups.filter((_, i) => rows[q].subarray(edges[i], edges[i + 1]).includes(1));
    const sum = rows[q].reduce((a, b) => a + b, 0);
    const amount = table.each > 1 ? `about ${sum * table.each} tokens` : plural(sum, "token");
    say.textContent = k === null
      ? `${place(q)} attends ${amount} of ${listed(to)}`
      : `${place(q)} ${rows[q][k] ? "attends" : "does not attend"} ${place(k)}`;
  }

  function place(cell) {
    const i = edges.findIndex((edge, j) => cell >= edge && cell < edges[j + 1]);
    const own = (cell - edges[i]) * table.each, each = table.tokens[i] / table.slots[i];
    const slot = Number.isInteger(each) && table.slots[i] > 1 && each > 1
      ? ` (slot ${Math.floor(own / each)}, token ${own % each})` : "";
    return `token ${own} of ${table.groups[i]}${slot}`;
  }

  function point(event) {
    const box = canvas.getBoundingClientRect();
    const at = (v, extent) => Math.max(0, Math.min(size - 1, Math.floor(v / extent * size)));
    const q = at(event.clientY - box.top, box.height), k = at(event.clientX - box.left, box.width);
    player.stop();
    player.go(q);
    tell(q, k);
  }
}

// ---- the cache, stage by stage ----

function programs(section) {
  const all = DATA.programs;
  let program = all[0];
  const about = element("p", { class: "note" });
  const say = element("p", { class: "facts", "aria-live": "polite" });
  const store = element("div", { class: "store" });
  const list = element("div", { class: "wide" });
  const player = new Player(section, program.stages.length, show, 1200);
  section.append(choice("program", all.map((p) => p.name), (i) => {
    program = all[i];
    player.stop();
    player.reset(program.stages.length);
  }), about, player.node, say, store, legend([["cache", "read from the cache"],
    ["now", "computed in this stage"], ["wait", "not there"]]), list);
  player.reset(program.stages.length);

  function show(step) {
    const stage = program.stages[step];
    const share = (s) => s.repeats * s.flops / program.flops;
    about.textContent = `${program.name}: ${operations(program.flops)} in all, of which ` +
      `${operations(program.rest)} outside of the network's evaluations (codec, embeddings).`;
    const many = stage.repeats > 1 ? `${stage.repeats} times ` : "";
    const text = { computed: "; keys and values of the text are made",
      cached: "; keys and values of the text are read", "": "" }[stage.text];
    const rows = stage.rows > 1 ? ` (${stage.rows} examples together)` : "";
    say.textContent = `${many}${stage.name}${rows}: ${operations(stage.flops)} each` +
      (stage.milliseconds === null ? "" : `, ${number(stage.milliseconds)} ms`) +
      `; computes ${count(stage.computed)}, reads ${count(stage.cached)} from the cache` +
      (Object.keys(stage.emits).length ? `, adds ${count(stage.emits)} (${bytes(stage.cache_bytes)})` : "") +
      text + ".";
    const groups = [...new Set(program.stages.flatMap((s) =>
      [...Object.keys(s.computed), ...Object.keys(s.cached)]))];
    const most = Math.max(1, ...program.stages.flatMap((s) =>
      [...Object.values(s.computed), ...Object.values(s.cached)]));
    store.replaceChildren(...groups.map((group) => {
      const tokens = stage.computed[group] ?? stage.cached[group] ?? 0;
      const kind = group in stage.computed ? "now" : group in stage.cached ? "cache" : "wait";
      const bar = element("div", { class: `bar ${kind}` });
      bar.style.width = `${Math.max(2, 100 * tokens / most)}%`;
      return element("div", { class: "row" }, element("span", { class: "name" }, group),
        element("div", { class: "track" }, bar), element("span", { class: "amount" },
          tokens ? plural(tokens, "token") : ""));
    }));
    const timed = program.stages.some((s) => s.milliseconds !== null);
    const head = ["stage", "runs", "computed", "cached", "FLOPs each", "share", ...(timed ? ["ms each"] : [])];
    const total = (values) => Object.values(values).reduce((a, b) => a + b, 0);
    list.replaceChildren(element("table", { class: "stages" },
      element("tr", {}, ...head.map((text) => element("th", {}, text))),
      ...program.stages.map((s, i) => element("tr", { class: i === step ? "chosen" : "",
        onclick: () => player.move(i - player.step) },
      element("td", {}, s.name), ...[s.repeats, total(s.computed), total(s.cached),
        operations(s.flops), `${number(100 * share(s))} %`,
        ...(timed ? [number(s.milliseconds)] : [])].map((text) =>
        element("td", { class: "number" }, String(text)))))));
  }

  function count(groups) {
    const names = Object.entries(groups).map(([name, tokens]) => `${name} (${tokens})`);
    return names.length ? names.join(" + ") : "nothing";
  }
}
