// The tokens of an answer: a strip of them, what all took together, and one looked at closely.

import { count, html, percent, plural, seconds, stack, sum } from "/page/common.js";

const PARTS = {
  queue: "queue", prefill: "prefill", attention: "attention", ffn: "feed-forward",
  output: "output", model: "model", sampling: "sampling", other: "other",
};
const HEADROOM = 1.6; // of a bar's height over the usual token's
const MOST_CELLS = 4096;

const partOf = (moment) => {
  const [first] = moment.split(".");
  return ["attention", "ffn", "output"].includes(first) ? first : "other";
};

// A name that may be broken behind its dots.
const breakable = (name) => name.split(/(?<=\.)/).flatMap((part) => [part, html("wbr")]);

const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];

// Seconds by part; the first token's prompt is read in one part, `prefill`.
function partsOf(timing, isFirst) {
  const parts = { queue: timing.queue, sampling: timing.sampling };
  if (isFirst) parts.prefill = timing.step_seconds;
  else if (!timing.moments) parts.model = timing.step_seconds;
  else {
    for (const [name, value] of Object.entries(timing.moments)) {
      const part = partOf(name);
      parts[part] = (parts[part] ?? 0) + value;
    }
  }
  const known = sum(Object.values(parts)) - (parts.other ?? 0);
  parts.other = Math.max(0, timing.seconds - known);
  return Object.keys(PARTS).filter((name) => parts[name] > 0).map((name) => [name, parts[name]]);
}

const total = (moments) => (moments ? sum(Object.values(moments)) : null);

function shareOfLimit(timings) {
  const known = timings.filter((timing) => timing.limits && timing.moments);
  if (!known.length) return null;
  return sum(known.map((each) => total(each.limits))) / sum(known.map((each) => total(each.moments)));
}

// What is not to be seen otherwise, as a word.
function shown(text) {
  if (text === "") return "end";
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

let numStrips = 0;

// What is shown of one answer. `onSelect(token)` hears which token is looked at, or null.
export class Strip {
  constructor(onSelect) {
    numStrips += 1;
    this.id = `strip${numStrips}`;
    this.onSelect = onSelect;
    this.tokens = []; // {text, bytes, logprob, top, timing, share}
    this.selected = null;
    this.scale = 0;
    this.strip = html("div", {
      class: "strip", id: this.id, role: "listbox", tabindex: "0", "aria-orientation": "horizontal",
      "aria-label": "Tokens of the answer. Arrow keys walk through them.",
    });
    this.facts = html("dl", { class: "facts" });
    this.key = html("ul", { class: "key" });
    this.detail = html("section", { class: "detail", "aria-label": "One token", hidden: "" });
    this.root = html("div", { class: "tokens", hidden: "" },
      this.facts, this.strip, this.key, this.detail);
    this.strip.addEventListener("click", (event) => {
      const cell = event.target.closest("[role=option]");
      if (cell) this.select(Number(cell.dataset.at));
    });
    this.strip.addEventListener("keydown", (event) => this.#walk(event));
  }

  // Some of a stream: scores of tokens, and the time of the step that made them.
  push(scores, timings) {
    let left = [...scores];
    for (const timing of timings) {
      const gained = left.splice(0, timing.tokens);
      if (!timing.tokens) gained.push({ token: "", bytes: [], logprob: null, top_logprobs: [] });
      for (const score of gained) this.#add(score, timing, gained.length);
    }
    for (const score of left) this.#add(score, null, 1);
  }

  restore(tokens) {
    for (const token of tokens) this.#show(token);
    this.refresh();
  }

  #add(score, timing, sharing) {
    this.#show({
      text: score.token, bytes: score.bytes, logprob: score.logprob, timing, sharing,
      top: score.top_logprobs.map((each) => [each.token, each.logprob]),
    });
  }

  #show(token) {
    const at = this.tokens.push(token) - 1;
    if (at >= MOST_CELLS) return;
    this.root.hidden = false;
    const time = token.timing ? token.timing.seconds / token.sharing : null;
    const name = token.text === "" ? "end" : `“${token.text}”`;
    const cell = html("div", {
      class: "cell", role: "option", id: `${this.id}-${at}`, "data-at": at,
      "aria-selected": "false", "aria-label": time === null ? name : `${name}, ${seconds(time)}`,
    }, html("i", { class: "bar" }), html("span", { class: "word" }, shown(token.text)),
    html("span", { class: "time" }, time === null ? "" : (1000 * time).toFixed(time < 0.0995 ? 1 : 0)));
    if (time !== null) {
      const parts = partsOf(token.timing, at === 0);
      const bar = cell.firstChild;
      cell.classList.toggle("ends", token.text === "");
      bar.style.setProperty("--time", time);
      bar.style.background = stack(
        parts.map(([part, value]) => [part, value / token.timing.seconds]).reverse(), "to top");
    }
    const follows = this.strip.scrollLeft + this.strip.clientWidth > this.strip.scrollWidth - 80;
    this.strip.append(cell);
    if (follows && this.selected === null) this.strip.scrollLeft = this.strip.scrollWidth;
  }

  get timings() {
    return this.tokens.map((token) => token.timing).filter((timing) => timing !== null)
      .filter((timing, at, all) => timing !== all[at - 1]);
  }

  // Sums and the scale of the bars: now and then while tokens come, and when all are there.
  refresh() {
    const timings = this.timings;
    if (!timings.length) return;
    const [first, ...rest] = timings;
    const usual = median((rest.length ? rest : timings).map((each) => each.seconds));
    if (Math.abs(usual - this.scale) > 0.15 * this.scale) {
      this.scale = usual;
      this.strip.style.setProperty("--scale", HEADROOM * usual);
    }
    for (const cell of this.strip.children) {
      const { timing, sharing } = this.tokens[cell.dataset.at];
      const time = timing ? timing.seconds / sharing : 0;
      cell.classList.toggle("tall", time > HEADROOM * this.scale);
    }
    this.#sumUp(first, rest);
    this.#fillKey(timings);
  }

  #sumUp(first, rest) {
    const spent = sum(rest.map((each) => each.seconds));
    const gained = sum(rest.map((each) => each.tokens));
    const share = shareOfLimit(rest.length ? rest : [first]);
    const facts = [
      ["first token", seconds(first.seconds)],
      ["tokens a second", gained ? (gained / spent).toFixed(gained / spent < 99.5 ? 1 : 0) : "–"],
      ["of the limit", share === null ? null : percent(share)],
      ["prompt from cache", this.promptTokens === undefined ? count(first.cached_tokens)
        : `${first.cached_tokens} of ${this.promptTokens}`],
      ["answers beside it", (sum(rest.map((each) => each.batch - 1)) / (rest.length || 1))
        .toFixed(1).replace(/\.0$/, "")],
    ];
    this.facts.replaceChildren(...facts.filter(([, value]) => value !== null).map(
      ([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, value))));
  }

  #fillKey(timings) {
    const sums = {};
    timings.forEach((timing, at) => {
      for (const [part, value] of partsOf(timing, at === 0)) sums[part] = (sums[part] ?? 0) + value;
    });
    this.key.replaceChildren(...Object.keys(PARTS).filter((part) => sums[part]).map((part) =>
      html("li", {}, html("i", { class: `swatch ${part}` }), `${PARTS[part]} `,
        html("b", {}, seconds(sums[part])))));
  }

  #walk(event) {
    const last = this.strip.children.length - 1;
    const at = this.selected;
    const targets = {
      ArrowRight: at === null ? 0 : at + 1, ArrowLeft: at === null ? last : at - 1, Home: 0,
      End: last,
    };
    if (event.key === "Escape" && at !== null) {
      event.stopPropagation(); // it closes this, and stops nothing
      this.select(null);
    } else if (event.key in targets) {
      event.preventDefault();
      this.select(Math.min(Math.max(targets[event.key], 0), last));
    }
  }

  select(at) {
    const cells = this.strip.children;
    if (this.selected !== null) cells[this.selected]?.setAttribute("aria-selected", "false");
    this.selected = at === null || !cells[at] ? null : at;
    if (this.selected === null) {
      this.strip.removeAttribute("aria-activedescendant");
      this.detail.hidden = true;
      this.onSelect(null);
      return;
    }
    const cell = cells[at];
    cell.setAttribute("aria-selected", "true");
    this.strip.setAttribute("aria-activedescendant", cell.id);
    this.#reveal(cell);
    this.#fillDetail(this.tokens[at], at);
    this.detail.hidden = false;
    this.onSelect(this.tokens[at]);
  }

  // Within the strip alone: the page stays where it is.
  #reveal(cell) {
    const { scrollLeft, clientWidth } = this.strip;
    const left = cell.offsetLeft - this.strip.offsetLeft;
    if (left < scrollLeft + 24) this.strip.scrollLeft = left - 24;
    const right = left + cell.offsetWidth;
    if (right > scrollLeft + clientWidth - 24) this.strip.scrollLeft = right - clientWidth + 24;
  }

  #fillDetail(token, at) {
    const close = html("button", { type: "button", "aria-label": "close" }, "×");
    close.addEventListener("click", () => {
      this.select(null);
      this.strip.focus();
    });
    const title = token.text === "" ? "the end of the answer" : shown(token.text);
    this.detail.replaceChildren(
      html("header", {}, html("h3", {}, html("code", {}, title), ` token ${at + 1}`), close),
      html("div", { class: "columns" }, ...[
        token.timing && this.#where(token, at === 0), alternatives(token),
      ].filter(Boolean)));
  }

  #where({ timing, sharing }, isFirst) {
    const about = [`${seconds(timing.seconds)}`];
    if (sharing > 1) about.push(`with ${plural(sharing - 1, "token")} of the same step`);
    if (timing.cycles) about.push(`${count(timing.cycles)} cycles in the model`);
    const share = shareOfLimit([timing]);
    if (share !== null) about.push(`${percent(share)} of the limit`);
    const others = timing.batch - 1;
    const steps = isFirst
      ? `The prompt took ${plural(timing.steps, "step")}, ${timing.cached_tokens} of its tokens came `
        + `from the cache.`
      : "";
    const company = others || timing.batch_tokens > timing.steps
      ? `${plural(timing.batch_tokens, "token")} of ${plural(timing.batch, "answer")} shared `
        + `${timing.steps > 1 ? "these steps" : "this step"}, and its time.`
      : "It was alone in its step.";
    return html("div", {}, html("p", {}, `${about.join(", ")}.`),
      html("p", { class: "quiet" }, `${steps} ${company}`.trim()), this.#table(timing, isFirst));
  }

  #table(timing, isFirst) {
    const body = html("tbody");
    const whole = timing.seconds;
    const most = Math.max(...Object.values(timing.moments ?? {}), timing.queue, timing.sampling,
      timing.moments ? 0 : timing.step_seconds);
    const inModel = total(timing.moments);
    const row = (part, name, value, limit, cycles) => {
      const bar = html("i", { class: `share ${part}` });
      bar.style.width = `${Math.min(100, Math.max(0.5, (100 * value) / most))}%`;
      body.append(html("tr", {}, html("th", { scope: "row" }, breakable(name)),
        html("td", { class: "bars" }, bar), html("td", {}, seconds(value)),
        html("td", {}, cycles === null ? "" : count(cycles)),
        html("td", {}, limit > 0 && value > 0 ? percent(limit / value) : "")));
    };
    if (timing.queue) row("queue", "queue", timing.queue, null, null);
    const moments = Object.entries(timing.moments ?? {});
    for (const [name, value] of moments) {
      row(partOf(name), name, value, timing.limits?.[name],
        timing.cycles && inModel ? (timing.cycles * value) / inModel : null);
    }
    if (!moments.length) {
      row(isFirst ? "prefill" : "model", "model", timing.step_seconds, null, null);
    }
    row("sampling", "sampling", timing.sampling, null, null);
    const rest = whole - timing.queue - timing.sampling - (inModel ?? timing.step_seconds);
    row("other", "other", Math.max(0, rest), null, null);
    const head = ["moment", "", "time", "cycles", "of limit"];
    return html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Moments" },
      html("table", {}, html("thead", {}, html("tr", {},
        head.map((name) => html("th", { scope: "col" }, name)))), body));
  }
}

function alternatives(token) {
  if (!token.top.length) return null;
  const list = html("ol", { class: "alternatives" });
  const isThere = token.top.some(([text]) => text === token.text);
  for (const [text, logprob] of isThere ? token.top : [...token.top, [token.text, token.logprob]]) {
    const bar = html("i", { class: "share" });
    bar.style.width = `${100 * Math.exp(logprob)}%`;
    const chosen = text === token.text;
    list.append(html("li", { class: chosen ? "chosen" : null },
      html("code", {}, shown(text)), html("span", { class: "bars" }, bar),
      html("span", {}, percent(Math.exp(logprob))),
      chosen ? html("span", { class: "unseen" }, "chosen") : null));
  }
  return html("div", {}, html("h4", {}, "What it could have been"), list);
}
