"use strict";
const DATA = JSON.parse(document.getElementById("explore").textContent);
const SVG = "http://www.w3.org/2000/svg";

// ---- parts ----

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  fill(made, attributes, children);
  return made;
}

function shape(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  fill(made, attributes, children);
  return made;
}

function fill(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
}

function number(value, digits = 3) {
  if (value === null) return "∞";
  return Number(value.toPrecision(digits)).toString();
}

function scaled(value, units) {
  let power = 0;
  while (Math.abs(value) >= 1000 && power < units.length - 1) { value /= 1000; power += 1; }
  return `${number(value)} ${units[power]}`;
}
const operations = (value) => scaled(value, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"]);
const bytes = (value) => scaled(value, ["B", "kB", "MB", "GB", "TB"]);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const listed = (names) => names.length ? names.join(" + ") : "nothing";

function choice(label, names, change) {
  const buttons = names.map((name, i) =>
    element("button", { type: "button", "aria-pressed": i === 0, onclick: () => pick(i) }, name));
  function pick(i) {
    buttons.forEach((b, j) => b.setAttribute("aria-pressed", i === j));
    change(i);
  }
  return element("div", { class: "choice", role: "group", "aria-label": label }, ...buttons);
}

// A slider with buttons; `show(step)` draws, from the first `reset` on. Keys reach the player of the
// section in view.
class Player {
  constructor(section, count, show, pace = 500) {
    this.show = show;
    this.pace = pace;
    this.timer = null;
    this.slider = element("input", { type: "range", min: 0, step: 1, value: 0,
      "aria-label": "step", oninput: () => this.go(Number(this.slider.value)) });
    this.label = element("output", { class: "count" });
    this.button = element("button", { type: "button", onclick: () => this.play(),
      "aria-label": "play or pause" }, "▶");
    const step = (by, sign, name) => element("button",
      { type: "button", "aria-label": name, onclick: () => this.move(by) }, sign);
    this.node = element("div", { class: "player" }, step(-1, "◀", "one step back"), this.button,
      step(1, "▶|", "one step on"), this.slider, this.label);
    section.player = this;
    [this.count, this.step] = [count, 0];
  }
  reset(count, at = 0) {
    this.count = count;
    this.slider.max = count - 1;
    this.go(at);
  }
  go(step) {
    this.step = Math.max(0, Math.min(this.count - 1, step));
    this.slider.value = this.step;
    this.label.textContent = `${this.step + 1} / ${this.count}`;
    this.show(this.step);
  }
  move(by) { this.stop(); this.go(this.step + by); }
  play() {
    if (this.timer) { this.stop(); return; }
    if (this.step === this.count - 1) this.go(0);
    this.button.textContent = "⏸";
    const stride = Math.max(1, Math.round(this.count / 120));
    this.timer = setInterval(() => {
      if (this.step >= this.count - 1) this.stop();
      else this.go(this.step + stride);
    }, Math.max(40, Math.min(this.pace, 12000 / this.count)));
  }
  stop() {
    clearInterval(this.timer);
    this.timer = null;
    this.button.textContent = "▶";
  }
}

// ---- pictures ----

function legend(items) {
  return element("p", { class: "legend" }, ...items.map(([kind, text]) =>
    element("span", {}, element("i", { class: kind }), text)));
}

function figure(source, caption) {
  return element("figure", {}, element("img", { src: source, alt: caption, class: "pixels" }),
    element("figcaption", {}, caption));
}

// [[how many rows, [[start, stop], ...]], ...] to rows of 0 and 1.
function unfold(mask) {
  const size = mask.reduce((sum, [count]) => sum + count, 0);
  const rows = [];
  for (const [count, runs] of mask) {
    const row = new Uint8Array(size);
    for (const [start, stop] of runs) row.fill(1, start, stop);
    for (let i = 0; i < count; i += 1) rows.push(row);
  }
  return rows;
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(["ink", "soft", "paper", "panel", "line", "accent", "warm", "good"]
    .map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

// A picture of a frame: a disc, hidden by as much noise as its level has.
function speckle(canvas, noise, part, seed) {
  const context = canvas.getContext("2d"), n = 16, image = context.createImageData(n, n);
  let state = 12345 + 7919 * seed;
  const random = () => (state = (state * 1103515245 + 12345) % 2147483648) / 2147483648;
  for (let i = 0; i < n * n; i += 1) {
    const [x, y] = [i % n - 7.5, Math.floor(i / n) - 7.5];
    const inside = (x + 3 - seed) ** 2 + y ** 2 < 16 ? 230 : 70;
    const grey = random() * 255;
    const shown = part !== undefined && noise === null ? i < part * n * n : noise !== null;
    const share = noise === null ? 0 : noise;
    const value = shown ? (1 - share) * inside + share * grey : 128;
    image.data.set([value, value, value, shown ? 255 : 40], 4 * i);
  }
  context.putImageData(image, 0, 0);
}

function shorten(names) {
  if (names.length <= 6) return names.join(", ");
  return `${names.slice(0, 3).join(", ")}, …, ${names[names.length - 1]}`;
}
