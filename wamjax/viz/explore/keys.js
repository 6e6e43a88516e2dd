// ---- all sections, and what keys do ----

const SECTIONS = { noising, schemes, slots, tables, programs };
for (const [name, draw] of Object.entries(SECTIONS)) draw(document.getElementById(name));

let active = null;  // the section that was last touched or asked for

const visible = (section) => {
  const box = section.getBoundingClientRect();
  return box.bottom > 0 && box.top < window.innerHeight;
};

function inView() {
  if (active?.player && visible(active)) return active;
  const middle = window.innerHeight / 3;
  const distance = (section) => {
    const box = section.getBoundingClientRect();
    return Math.max(0, box.top - middle, middle - box.bottom);
  };
  return [...document.querySelectorAll("section")].filter((section) => section.player)
    .sort((a, b) => distance(a) - distance(b))[0];
}

for (const kind of ["pointerdown", "focusin"]) {
  document.addEventListener(kind, (event) => { active = event.target.closest("section") ?? active; });
}

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const slider = event.target.type === "range";
  const names = Object.keys(SECTIONS), key = event.key;
  if (key >= "1" && key <= String(names.length)) {
    active = document.getElementById(names[key - 1]);
    active.scrollIntoView();
    event.preventDefault();
    return;
  }
  const player = inView()?.player;
  if (!player) return;
  if (!slider && (key === "ArrowLeft" || key === "ArrowRight")) {
    player.move(key === "ArrowLeft" ? -1 : 1);
  } else if (!slider && (key === "Home" || key === "End")) {
    player.move(key === "Home" ? -player.count : player.count);
  } else if (key === " " && event.target.tagName !== "BUTTON") {
    player.play();
  } else return;
  event.preventDefault();
});

// Colours of the canvases follow the scheme of the system.
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const section of document.querySelectorAll("section")) {
    if (section.player) section.player.go(section.player.step);
  }
});
document.documentElement.dataset.ready = "yes";
