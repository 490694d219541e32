// The head of the report: what bounds this model here, how far that is from the limit, what to do.

const BOUND_BY = {
  bytes: { verb: "waits for memory", short: "bound by bytes" },
  operations: { verb: "is bound by arithmetic", short: "bound by arithmetic" },
  host: { verb: "is held up outside the model", short: "outside the model" },
};

function boundOf(phase) {
  const shares = Object.keys(BOUND_BY).map((bound) => {
    const members = phase.moments.filter((moment) =>
      bound === "host" ? moment.class === "host" : moment.bound === bound);
    return { bound, share: sum(members.map(whole)) / phase.cycles };
  });
  return shares.sort((a, b) => b.share - a.share)[0];
}

function largestLoss(phase) {
  const losses = phase.kinds.filter((kind) => isNumber(kind.limit_fraction)).map((kind) => ({
    kind, share: Math.max(0, whole(kind) - kind.limit_cycles) / phase.cycles,
  }));
  return losses.sort((a, b) => b.share - a.share)[0];
}

// Tokens a second where every moment of decode runs at its limit.
function decodeLimit() {
  const limit = profile.decode?.limit_cycles;
  return limit > 0 && isNumber(coreHertz) ? (profile.settings.batch * coreHertz) / limit : null;
}

function drawVerdict() {
  const { decode, prefill } = phases;
  const share = profile.limit_fraction;
  const bound = boundOf(decode);
  byId("verdict-title").textContent = isNumber(share)
    ? `Decode ${BOUND_BY[bound.bound].verb} and runs at ${percent(share)} of this machine’s limit.`
    : `Decode ${BOUND_BY[bound.bound].verb}.`;

  const reasons = byId("reasons");
  reasons.append(`Moments ${BOUND_BY[bound.bound].short} take ${percent(bound.share)} of a token’s `
    + `${UNIT}`, from("derived"), ". ");
  if (decodeLimit()) {
    reasons.append(`The limit is ${digits(decodeLimit())} tokens/s`, from(SOURCES.limit), ". ");
  }
  const loss = largestLoss(decode);
  if (loss && loss.share > 0.005) {
    reasons.append("Most is lost in ", html("code", {}, loss.kind.name),
      `: at its limit a token would take ${percent(loss.share)} less`, from("derived"), ". ");
  }
  if (isNumber(profile.prefill?.limit_fraction) && prefill.moments.length) {
    const far = percent(profile.prefill.limit_fraction);
    reasons.append(`Prefill ${BOUND_BY[boundOf(prefill).bound].verb} and reaches ${far} of its limit`,
      from(SOURCES.limit), ".");
  }
  drawAdvice();
}

function drawAdvice() {
  const advice = profile.advice ?? [];
  if (!advice.length) return byId("next").remove();
  byId("next").append(html("h3", {}, "Next"), html("ol", {}, advice.map((each) => {
    const band = isNumber(each.low) ? `, ${percent(each.low)} to ${percent(each.high)}` : "";
    return html("li", { "data-change": each.change, "data-gain": each.gain_fraction },
      each.sentence, " ",
      html("span", { class: "gain" }, `(${signed(each.gain_fraction)}${band}`, from("modelled"), ")"));
  })));
}

function drawFigures() {
  const spread = (value, show) =>
    value && isNumber(value.min) ? `${show(value.min)} to ${show(value.max)}` : "";
  const perToken = profile.time_per_token;
  const first = profile.time_to_first_token;
  const rate = profile.tokens_per_second_spread;
  const prefill = profile.prefill ?? {};
  const limits = {
    decode: decodeLimit() ? `of ${digits(decodeLimit())} tokens/s` : "",
    prefill: isNumber(prefill.limit_fraction) ? `${percent(prefill.limit_fraction)} of limit` : "",
  };
  const figures = [
    ["time to first token", seconds(first?.median), spread(first, seconds), SOURCES.time,
      first?.median],
    ["time per token", seconds(perToken?.median), spread(perToken, seconds), SOURCES.time,
      perToken?.median],
    ["tokens/s", digits(profile.tokens_per_second), spread(rate, digits), SOURCES.time,
      profile.tokens_per_second],
    ["share of limit, decode", percent(profile.limit_fraction), limits.decode, SOURCES.limit,
      profile.limit_fraction],
    [`${UNIT} per token`, count(profile.cycles_per_token), "", SOURCES.cycles,
      profile.cycles_per_token],
    ["prefill tokens/s", digits(prefill.tokens_per_second), limits.prefill, SOURCES.time, prefill.tokens_per_second],
  ];
  byId("figures").append(...figures.map(([name, value, note, kind, datum]) =>
    html("div", {}, html("dt", {}, name),
      html("dd", { "data-figure": name, "data-value": datum },
        html("div", { class: "value" }, value, from(kind)),
        html("div", { class: "spread" }, note)))));
}

function drawHeader() {
  const { model, settings, host } = profile;
  document.title = `${model.name} · Cyclewise`;
  byId("model").textContent = model.name;
  const formats = Object.entries(model.formats ?? {}).sort((a, b) => b[1] - a[1])
    .map(([name]) => name);
  const words = [
    [model.architecture, plural(model.layers, "layer"), formats.join(", ")]
      .filter(Boolean).join(", "),
    `prompt of ${settings.prompt_tokens}, ${settings.generate_tokens} generated`,
    `batch ${settings.batch}`, plural(settings.threads, "thread"),
    plural(settings.repeats, "repeat"), host?.cpu,
    host?.date ? String(host.date).slice(0, 10).replaceAll("-", "\u2011") : null,
  ];
  byId("setting").textContent = words.filter(Boolean).join(" · ");
  document.querySelector("header .key").append(
    ...Object.keys(KINDS_OF_PROVENANCE).map((kind) => {
      const dot = html("i", { class: `from ${kind}` });
      return html("span", {}, dot, KINDS_OF_PROVENANCE[kind]);
    }));
  for (const node of document.querySelectorAll(".unit")) node.textContent = UNIT;
  for (const node of document.querySelectorAll(".unit-one")) node.textContent = UNIT.slice(0, -1);
}
