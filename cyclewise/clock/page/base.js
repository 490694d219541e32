// What all pictures share: the profile, numbers as text, elements, marks that explain themselves.

const profile = JSON.parse(document.getElementById("profile").textContent);
const UNIT = profile.clock?.counts_cycles === false ? "ticks" : "cycles";
const CLASSES = ["matmul", "activation", "memory", "host"];
const CLASS_NAMES = {
  matmul: "matrix multiplication", activation: "activation", memory: "memory",
  host: "outside the model",
};
const THIN = "\u202f";

const byId = (id) => document.getElementById(id);
const sum = (values) => values.reduce((total, value) => total + value, 0);
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// Numbers as text

function digits(value, places = 3) {
  if (!isNumber(value)) return "–";
  if (value === 0) return "0";
  const whole = Math.floor(Math.log10(Math.abs(value))) + 1;
  return value.toFixed(clamp(places - whole, 0, places + 2));
}

function count(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  for (const [scale, prefix] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= 0.9995 * scale) return digits(value / scale) + THIN + prefix;
  }
  return digits(value, size < 1 ? 2 : 3);
}

function seconds(value) {
  if (!isNumber(value)) return "–";
  for (const [scale, unit] of [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]]) {
    if (Math.abs(value) >= 0.9995 * scale) return digits(value / scale) + THIN + unit;
  }
  return digits(value / 1e-9) + THIN + "ns";
}

function percent(share) {
  if (!isNumber(share)) return "–";
  const value = 100 * share;
  if (value !== 0 && Math.abs(value) < 0.005) return `<0.01${THIN}%`;
  const places = Math.abs(value) >= 9.95 || value === 0 ? 0 : Math.abs(value) >= 0.095 ? 1 : 2;
  return value.toFixed(places) + THIN + "%";
}

const signed = (share) => (share > 0 ? "+" : "") + percent(share).replace("-", "−");

function bytes(value) {
  if (!isNumber(value)) return "–";
  return value < 1000 ? `${digits(value)}${THIN}B` : `${count(value).replace("k", "K")}B`;
}

const plural = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

// Elements. Every string becomes a text node: names of models and moments are not trusted.

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const html = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const line = (x1, y1, x2, y2, name) => svg("line", { x1, y1, x2, y2, class: name });
const label = (x, y, text, attributes = {}) => svg("text", { x, y, ...attributes }, text);

const KINDS_OF_PROVENANCE = {
  measured: "measured: read from the clock",
  derived: "derived: computed from measurements and the program",
  modelled: "modelled: predicted, not yet measured",
};

function from(kind) {
  if (!(kind in KINDS_OF_PROVENANCE)) return null;
  const mark = html("span", { class: `from ${kind}`, title: KINDS_OF_PROVENANCE[kind] });
  mark.append(html("span", { class: "unseen" }, ` (${kind})`));
  return mark;
}

// The profile's own word for the provenance of a quantity, else what it is by construction.
function sourceOf(quantity, otherwise) {
  const word = String(profile.provenance?.[quantity] ?? "").match(/^[a-z]+/)?.[0];
  return word in KINDS_OF_PROVENANCE ? word : otherwise;
}

const SOURCES = {
  cycles: sourceOf("cycles", "measured"),
  time: sourceOf("time", "measured"),
  operations: sourceOf("operations", "derived"),
  bytes: sourceOf("bytes", "derived"),
  limit: sourceOf("limit_cycles", "modelled"),
  roofs: sourceOf("roofs", "measured"),
};

function swatch(name, text) {
  return html("span", {}, html("i", { class: `swatch ${name}` }), text);
}

// Marks: whatever is drawn for a datum. A tip is a title and rows of [label, value, provenance].

const tips = new WeakMap();

function mark(node, title, rows) {
  node.setAttribute("data-tip", "");
  tips.set(node, { title, rows });
  return node;
}

function showTip(node, x, y) {
  const tip = byId("tip");
  const { title, rows } = tips.get(node);
  const list = html("dl");
  for (const [name, value, kind] of rows) {
    list.append(html("dt", {}, name), html("dd", {}, value, from(kind)));
  }
  tip.replaceChildren(html("b", {}, title), list);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 14 + width > innerWidth ? x - width - 14 : x + 14;
  const top = y + 14 + height > innerHeight ? y - height - 14 : y + 14;
  tip.style.left = `${clamp(left, 6, Math.max(6, innerWidth - width - 6))}px`;
  tip.style.top = `${clamp(top, 6, Math.max(6, innerHeight - height - 6))}px`;
}

const hideTip = () => { byId("tip").hidden = true; };

addEventListener("pointermove", (event) => {
  const node = event.target.closest?.("[data-tip]");
  if (node && tips.has(node)) showTip(node, event.clientX, event.clientY);
  else if (event.pointerType === "mouse") hideTip();
});
addEventListener("scroll", hideTip, { passive: true });

// A picture redraws itself when its width changes. With the keyboard its marks are walked one
// by one, so that the tab key has one stop for each picture.
function picture(container, title, draw) {
  let drawn = 0;
  const redraw = () => {
    const width = Math.floor(container.clientWidth);
    if (width <= 0) return;
    drawn = width;
    const drawing = draw(width);
    fill(drawing, { role: "group", tabindex: "0" }, []);
    drawing.setAttribute("aria-label", `${title}. Arrow keys walk through it.`);
    walk(drawing);
    container.replaceChildren(drawing);
  };
  redraw();
  new ResizeObserver(() => {
    if (Math.floor(container.clientWidth) !== drawn) redraw();
  }).observe(container);
  return redraw;
}

function walk(drawing) {
  let at = -1;
  const leave = () => {
    drawing.querySelector(".here")?.classList.remove("here");
    hideTip();
  };
  drawing.addEventListener("blur", leave);
  drawing.addEventListener("keydown", (event) => {
    const marks = drawing.querySelectorAll("[data-tip]");
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 };
    if (event.key === "Escape") return leave();
    if (event.key === "Home") at = 0;
    else if (event.key === "End") at = marks.length - 1;
    else if (event.key in steps) at = clamp(at + steps[event.key], 0, marks.length - 1);
    else return;
    if (!marks.length) return;
    event.preventDefault();
    leave();
    marks[at].classList.add("here");
    const box = marks[at].getBoundingClientRect();
    showTip(marks[at], box.left + box.width / 2, box.top + box.height / 2);
  });
}

// Axes

const linear = (low, high, start, end) => (value) =>
  start + ((value - low) / (high - low || 1)) * (end - start);
const logarithmic = (low, high, start, end) => (value) =>
  start + (Math.log(value / low) / Math.log(high / low)) * (end - start);

function ticks(low, high, number) {
  const rough = (high - low) / Math.max(1, number);
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high * (1 + 1e-9); n += 1) found.push(n * step);
  return found;
}
