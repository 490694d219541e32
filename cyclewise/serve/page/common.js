// What both pages share: elements, numbers as text, and whether the server is there.

export const byId = (id) => document.getElementById(id);
export const sum = (values) => values.reduce((total, value) => total + value, 0);

// Every string becomes a text node: what users and models say is never read as HTML.
export function html(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

// Numbers as text

const THIN = "\u202f";
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

export function digits(value, places = 3) {
  if (!isNumber(value)) return "–";
  if (value === 0) return "0";
  const whole = Math.floor(Math.log10(Math.abs(value))) + 1;
  return value.toFixed(Math.min(Math.max(places - whole, 0), places));
}

export function seconds(value) {
  if (!isNumber(value)) return "–";
  for (const [scale, unit] of [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]]) {
    if (value >= 0.9995 * scale) return digits(value / scale) + THIN + unit;
  }
  return value > 0 ? `<1${THIN}µs` : "0";
}

export function count(value) {
  if (!isNumber(value)) return "–";
  for (const [scale, prefix] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (value >= 0.9995 * scale) return digits(value / scale) + THIN + prefix;
  }
  return digits(value, 3);
}

export const percent = (share) => {
  if (!isNumber(share)) return "–";
  const value = 100 * share;
  if (value > 0 && value < 0.05) return `<0.1${THIN}%`;
  return value.toFixed(value > 0 && value < 0.95 ? 1 : 0) + THIN + "%";
};
export const plural = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

// A bar of parts that lie side by side: pairs of a name that the style sheet has a colour for, and
// a share of the whole.
export function stack(parts, direction) {
  const stops = [];
  let at = 0;
  for (const [name, share] of parts) {
    stops.push(`var(--${name}) ${(100 * at).toFixed(2)}% ${(100 * (at + share)).toFixed(2)}%`);
    at += share;
  }
  return `linear-gradient(${direction}, ${stops.join(", ")})`;
}

// Whether the server is there. Looked at now and then while somebody looks at the page, and more
// often while it is away.

const CHECK_MS = { there: 5000, away: 1000 };
const BACK_MS = 10000; // how long it is said that it is back
let isThere = null;
let timer = null;
const listeners = [];

export function whenServerChanges(listener) {
  listeners.push(listener);
}

export function noteServer(there) {
  if (there === isThere) return;
  const first = isThere === null;
  isThere = there;
  const place = byId("server");
  place.dataset.state = there ? "there" : "away";
  if (there) {
    place.textContent = first ? "" : "The server is back.";
    setTimeout(() => { if (isThere) place.textContent = ""; }, BACK_MS);
  } else place.textContent = "The server does not answer. Trying again…";
  for (const listener of listeners) listener(there);
}

async function check() {
  clearTimeout(timer);
  try {
    const answer = await fetch("/health", { cache: "no-store", signal: AbortSignal.timeout(4000) });
    noteServer(answer.ok);
  } catch {
    noteServer(false);
  }
  if (!document.hidden) timer = setTimeout(check, isThere ? CHECK_MS.there : CHECK_MS.away);
}

export function watchServer() {
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) clearTimeout(timer);
    else check();
  });
  check();
}

export { check as checkServer };
