// The running batch, asked for once a second while somebody looks.

import {
  byId, html, noteServer, percent, seconds, stack, watchServer, whenServerChanges,
} from "/page/common.js";

const POLL_MS = 1000;
const HISTORY = 60; // measurements
const STATES = { decode: "decoding", prefill: "reading", waiting: "waiting" };

let before = null;
let timer = null;
const rates = [];

async function poll() {
  clearTimeout(timer);
  try {
    const answer = await fetch("/v1/batch", {
      cache: "no-store", signal: AbortSignal.timeout(4000),
    });
    if (answer.ok) {
      noteServer(true);
      show(await answer.json());
    }
  } catch {
    noteServer(false);
  }
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(poll, POLL_MS);
}

function show(batch) {
  const { pages, totals, answers } = batch;
  byId("model").textContent = batch.model;
  for (const [id, state] of [["decoding", "decode"], ["prefilling", "prefill"],
    ["waiting", "waiting"]]) {
    byId(id).textContent = answers.filter((each) => each.state === state).length;
  }
  const restarted = before && batch.totals.steps < before.totals.steps;
  if (before && !restarted && batch.time > before.time) {
    const passed = batch.time - before.time;
    const rate = (totals.generated_tokens - before.totals.generated_tokens) / passed;
    byId("rate").textContent = rate.toFixed(rate < 9.95 && rate > 0 ? 1 : 0);
    const busy = (totals.step_seconds - before.totals.step_seconds) / passed;
    byId("busy").textContent = percent(Math.min(1, busy));
    rates.push(rate);
    if (rates.length > HISTORY) rates.shift();
    showHistory();
  }
  before = batch;
  for (const name of ["used", "cached", "free", "total"]) byId(name).textContent = pages[name];
  byId("page-tokens").textContent = pages.tokens;
  byId("pages").style.background = stack(
    ["used", "cached", "free"].map((name) => [name, pages[name] / pages.total]), "to right");
  byId("answers").replaceChildren(...answers.map(row));
  byId("none").hidden = answers.length > 0;
}

function showHistory() {
  const most = Math.max(...rates, 1);
  byId("history").replaceChildren(...rates.map((rate) => {
    const bar = html("i");
    bar.style.height = `${(100 * rate) / most}%`;
    return bar;
  }));
  byId("history").setAttribute("aria-label",
    `${rates.at(-1).toFixed(0)} tokens a second now, ${most.toFixed(0)} at most`);
}

function row(answer) {
  const done = answer.evaluated_tokens / answer.prompt_tokens;
  const prompt = answer.state === "prefill"
    ? [`${answer.evaluated_tokens} of ${answer.prompt_tokens}`,
      html("progress", { value: done, max: 1, "aria-label": "of the prompt that was read" })]
    : [`${answer.prompt_tokens}`];
  const most = answer.most_tokens === null ? "" : ` of ${answer.most_tokens}`;
  const name = answer.index ? `${answer.job}, answer ${answer.index + 1}` : `${answer.job}`;
  return html("tr", {},
    html("th", { scope: "row" }, name),
    html("td", {}, html("span", { class: `state ${answer.state}` }, STATES[answer.state])),
    html("td", {}, seconds(answer.seconds)),
    html("td", {}, ...prompt),
    html("td", {}, `${answer.reused_tokens}`),
    html("td", {}, `${answer.generated_tokens}${most}`),
    html("td", {}, `${answer.pages}`),
    html("td", {}, `${answer.priority}`));
}

whenServerChanges((there) => {
  document.body.classList.toggle("stale", !there);
  if (there) poll();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else poll();
});
watchServer();
poll();
