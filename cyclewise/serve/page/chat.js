// A conversation: what was typed goes out, the answer comes in, and all of it survives a reload.
// It is kept for this tab alone.

import { byId, checkServer, html, noteServer, watchServer, whenServerChanges } from "/page/common.js";
import { Gone, stream } from "/page/stream.js";
import { Strip } from "/page/strip.js";

const SAVE_MS = 1000;
const REFRESH_MS = 250;
const SPEAK_MS = 2000;
const NOTES = {
  stopped: "Stopped.",
  left: "The page was left before the answer was complete.",
  length: "As long as was asked for, or as the context allows.",
};

const turns = []; // {role: "user", text} and {role: "assistant", text, state, note, promptTokens}
const shown = []; // what is on the page of each
const form = byId("composer");
const message = byId("message");
let model = null;
let isLeft = false; // the page is being closed, loaded again or left for another
let running = null; // the AbortController of the answer that is being made

// Text: code between lines of three backticks looks like code. Nothing is left out, so that places
// in the text are places in the answer.

function piecesOf(text) {
  const pieces = [];
  let code = false;
  for (const line of text.split(/(?<=\n)/)) {
    const isFence = /^\s*```/.test(line);
    const kind = isFence ? "fence" : code ? "code" : "prose";
    if (isFence) code = !code;
    if (pieces.at(-1)?.kind === kind && !isFence) pieces.at(-1).text += line;
    else pieces.push({ kind, text: line });
  }
  return pieces;
}

function setText(place, text) {
  const pieces = piecesOf(text);
  pieces.forEach(({ kind, text: piece }, at) => {
    let node = place.children[at];
    if (node?.className !== kind) {
      const fresh = html(kind === "code" ? "pre" : "div", { class: kind });
      if (node) node.replaceWith(fresh);
      else place.append(fresh);
      node = fresh;
    }
    if (node.textContent !== piece) node.textContent = piece;
  });
  while (place.children.length > pieces.length) place.lastChild.remove();
}

// Where the text of each token ends in an answer, by the bytes of all before it.
function endsOf(tokens, text) {
  const decoder = new TextDecoder();
  let whole = "";
  const ends = tokens.map((token) => {
    whole += decoder.decode(new Uint8Array(token.bytes), { stream: true });
    return whole.length;
  });
  const cut = text.startsWith(whole.slice(0, 8)) ? 0 : whole.length - whole.trimStart().length;
  return ends.map((end) => Math.max(0, end - cut));
}

function nodeAt(place, offset) {
  const walker = document.createTreeWalker(place, NodeFilter.SHOW_TEXT);
  let left = offset;
  let node = walker.nextNode();
  while (node && left > node.length) {
    left -= node.length;
    node = walker.nextNode();
  }
  return node ? [node, left] : null;
}

function markToken(view, turn, token) {
  if (!globalThis.CSS?.highlights) return;
  CSS.highlights.delete("token");
  if (token === null) return;
  const ends = endsOf(view.strip.tokens, turn.text);
  const at = view.strip.tokens.indexOf(token);
  const [first, last] = [nodeAt(view.text, ends[at - 1] ?? 0), nodeAt(view.text, ends[at])];
  if (!first || !last) return;
  const range = new Range();
  range.setStart(...first);
  range.setEnd(...last);
  CSS.highlights.set("token", new Highlight(range));
}

// What is on the page

function show(turn) {
  const text = html("div", { class: "text" });
  const view = { text };
  if (turn.role === "user") {
    view.root = html("article", { class: "user", "aria-label": "You" }, text);
  } else {
    view.strip = new Strip((token) => markToken(view, turn, token));
    view.strip.promptTokens = turn.promptTokens;
    view.note = html("p", { class: "note" });
    view.again = html("button", { type: "button", class: "again" }, "Try again");
    view.again.addEventListener("click", again);
    view.root = html("article", { class: "assistant", "aria-label": "The model" },
      text, html("div", { class: "foot" }, view.note, view.again), view.strip.root);
  }
  turns.push(turn);
  shown.push(view);
  byId("turns").append(view.root);
  draw(turn, view);
  return view;
}

function draw(turn, view) {
  setText(view.text, turn.text);
  if (turn.role === "assistant") {
    view.root.dataset.state = turn.state;
    view.root.setAttribute("aria-busy", String(turn.state === "running"));
    view.note.textContent = turn.note ?? "";
    view.again.hidden = turn.state === "running" || turn !== turns.at(-1);
  }
  byId("welcome").hidden = turns.length > 0;
}

function drop() {
  turns.pop();
  shown.pop().root.remove();
}

const isAtEnd = () => innerHeight + scrollY > document.documentElement.scrollHeight - 60;
const toEnd = () => scrollTo(0, document.documentElement.scrollHeight);

// For screen readers: whole sentences, and not too often.

class Speech {
  constructor() {
    this.said = 0;
    this.time = 0;
    byId("speech").replaceChildren();
  }

  hear(text, isWhole) {
    const end = isWhole ? text.length : text.search(/[.!?:\n][^.!?:\n]*$/) + 1;
    if (end <= this.said || (!isWhole && performance.now() < this.time + SPEAK_MS)) return;
    byId("speech").append(html("p", {}, text.slice(this.said, end)));
    this.said = end;
    this.time = performance.now();
  }
}

// Asking

function asked() {
  const fields = form.elements;
  const body = { model, logprobs: true, timings_per_token: true, messages: [] };
  const numbers = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens",
    "seed", "top_logprobs"];
  for (const name of numbers) {
    if (fields[name].value !== "") body[name] = Number(fields[name].value);
  }
  if (fields.system.value.trim()) {
    body.messages.push({ role: "system", content: fields.system.value });
  }
  for (const { role, text } of turns.filter((turn) => turn.text)) {
    const last = body.messages.at(-1);
    // after an answer that never came; templates want turns to alternate
    if (last?.role === role) last.content += `\n\n${text}`;
    else body.messages.push({ role, content: text });
  }
  return body;
}

async function answer() {
  const body = asked();
  const turn = { role: "assistant", text: "", state: "running", note: "Waiting…" };
  const view = show(turn);
  const speech = new Speech();
  running = new AbortController();
  setRunning(true);
  toEnd();
  let frame = 0;
  const saving = setInterval(save, SAVE_MS);
  const refreshing = setInterval(() => view.strip.refresh(), REFRESH_MS);
  const redraw = () => {
    frame = 0;
    const follows = isAtEnd();
    draw(turn, view);
    speech.hear(turn.text, false);
    if (follows) toEnd();
  };
  try {
    if (model === null) await findModel();
    for await (const chunk of stream({ ...body, model }, running.signal)) {
      noteServer(true);
      for (const choice of chunk.choices) {
        turn.text += choice.delta.content ?? "";
        view.strip.push(choice.logprobs?.content ?? [], choice.timings ?? []);
        if (view.strip.tokens.length) turn.note = "";
        if (choice.finish_reason) turn.reason = choice.finish_reason;
      }
      if (chunk.usage) turn.promptTokens = chunk.usage.prompt_tokens;
      frame ||= requestAnimationFrame(redraw);
    }
    turn.state = "done";
    turn.note = turn.reason === "length" ? NOTES.length : "";
  } catch (error) {
    turn.state = error.name === "AbortError" && !isLeft ? "stopped" : "failed";
    if (isLeft) turn.note = NOTES.left;
    else if (turn.state === "stopped") turn.note = NOTES.stopped;
    else if (error instanceof Gone) {
      turn.note = "The server went away. What was said is kept.";
      checkServer();
    } else turn.note = sentence(error.message);
  } finally {
    clearInterval(saving);
    clearInterval(refreshing);
    cancelAnimationFrame(frame);
  }
  running = null;
  const follows = isAtEnd();
  view.strip.promptTokens = turn.promptTokens;
  view.strip.refresh();
  draw(turn, view);
  speech.hear(turn.text, true);
  if (turn.note) byId("speech").append(html("p", {}, turn.note));
  setRunning(false);
  if (follows) toEnd();
  save();
  saveTokens();
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1).replace(/\.?$/, ".");

function setRunning(isRunning) {
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
}

async function findModel() {
  try {
    const answered = await fetch("/v1/models", { cache: "no-store" });
    if (answered.ok) model = (await answered.json()).data[0].id;
  } catch {
    throw new Gone("no answer");
  }
  byId("model").textContent = model ?? "";
}

function isAskable() {
  if (running) return false;
  if (form.checkValidity()) return true;
  byId("settings").open = true;
  form.reportValidity();
  return false;
}

function send() {
  const text = message.value.trim();
  if (!text || !isAskable()) return;
  if (turns.at(-1)?.role === "assistant") shown.at(-1).again.hidden = true;
  show({ role: "user", text });
  message.value = "";
  fit();
  answer();
}

function again() {
  if (!isAskable()) return;
  if (turns.at(-1).role === "assistant") drop();
  message.focus();
  answer();
}

function fit() {
  message.style.height = "auto";
  message.style.height = `${Math.min(message.scrollHeight + 2, innerHeight / 3)}px`;
}

// Kept for this tab

const KEPT = "cyclewise.chat";
const KEPT_TOKENS = "cyclewise.tokens";

function settings() {
  return Object.fromEntries([...form.querySelectorAll("#settings [name]")].map(
    (field) => [field.name, field.value]));
}

function keep(name, value) {
  try {
    sessionStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false; // there is no room, or none may be used
  }
}

function save() {
  const kept = { turns, draft: message.value, settings: settings() };
  if (!keep(KEPT, kept)) {
    sessionStorage.removeItem(KEPT_TOKENS); // words count for more
    keep(KEPT, kept);
  }
}

// Tokens of the last answers, as many as there is room for.
function saveTokens() {
  const tokens = shown.map((view) => view.strip?.tokens ?? []);
  for (let from = 0; from < tokens.length; from += 1) {
    if (tokens[from].length && keep(KEPT_TOKENS, { from, tokens: tokens.slice(from) })) return;
  }
}

function read(name) {
  try {
    return JSON.parse(sessionStorage.getItem(name));
  } catch {
    return null;
  }
}

function restore() {
  const kept = read(KEPT);
  if (!kept) return;
  for (const [name, value] of Object.entries(kept.settings)) {
    if (form.elements[name]) form.elements[name].value = value;
  }
  message.value = kept.draft;
  const tokens = read(KEPT_TOKENS);
  kept.turns.forEach((turn, at) => {
    if (turn.state === "running") Object.assign(turn, { state: "failed", note: NOTES.left });
    const view = show(turn);
    const known = tokens?.tokens[at - tokens.from];
    if (view.strip && known) view.strip.restore(known);
  });
  turns.forEach((turn, at) => draw(turn, shown[at]));
  toEnd();
}

// What is pressed

form.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
form.noValidate = true;
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
message.addEventListener("input", fit);
byId("stop").addEventListener("click", () => {
  running?.abort();
  message.focus();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
byId("new").addEventListener("click", () => {
  if (turns.length && !confirm("Forget this conversation?")) return;
  running?.abort();
  while (turns.length) drop();
  byId("welcome").hidden = false;
  save();
  saveTokens();
  sessionStorage.removeItem(KEPT_TOKENS);
  message.focus();
});
byId("turns").addEventListener("click", (event) => {
  const view = shown.find((each) => each.text.contains(event.target));
  const caret = document.caretPositionFromPoint?.(event.clientX, event.clientY);
  if (!view?.strip?.tokens.length || !caret || !getSelection().isCollapsed) return;
  let offset = caret.offset;
  const walker = document.createTreeWalker(view.text, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node && node !== caret.offsetNode; node = walker.nextNode()) {
    offset += node.length;
  }
  const turn = turns[shown.indexOf(view)];
  const at = endsOf(view.strip.tokens, turn.text).findIndex((end) => end > offset);
  if (at >= 0) view.strip.select(at);
});
addEventListener("pagehide", () => {
  isLeft = true;
  running?.abort();
  save();
  saveTokens();
});
addEventListener("pageshow", () => {
  isLeft = false; // the browser may have kept the page as it was
});
whenServerChanges((there) => {
  if (there) findModel().catch(() => {});
});

restore();
fit();
watchServer();
message.focus();
