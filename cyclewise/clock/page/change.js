// How cycles change: from token to token, with the size of the work, and with what might be done.

function drawStrip(width) {
  const tokens = profile.tokens;
  const sorted = tokens.map((token) => token.cycles).sort((a, b) => a - b);
  const quantile = (share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  const [median, p99] = [quantile(0.5), quantile(0.99)];
  const usual = tokens.filter((token) => !token.outlier).map((token) => token.cycles);
  const most = Math.max(...(usual.length ? usual : sorted));
  const room = Math.max(most - sorted[0], 0.02 * median);
  const high = most + 0.3 * room;
  const low = sorted[0] - 0.12 * room;
  const [left, right, bottom, height] = [56, 62, 34, 230];
  const x = linear(0, Math.max(1, tokens.length - 1), left + 4, width - right);
  const y = linear(low, high, height - bottom, 10);
  const drawing = svg("svg", { width, height });
  for (const tick of ticks(low, high, 5)) {
    drawing.append(line(left, y(tick), width - right, y(tick), "axis"),
      label(left - 6, y(tick) + 4, count(tick), { "text-anchor": "end" }));
  }
  const { repeats } = profile.settings;
  if (repeats > 1 && tokens.length % repeats === 0) {
    const each = tokens.length / repeats;
    for (let repeat = 0; repeat < repeats; repeat += 1) {
      if (repeat) drawing.append(line(x(repeat * each - 0.5), 10, x(repeat * each - 0.5),
        height - bottom, "axis major"));
      drawing.append(label(x((repeat + 0.5) * each - 0.5), height - bottom + 16,
        width < 640 ? String(repeat + 1) : `repeat ${repeat + 1}`, { "text-anchor": "middle" }));
    }
  }
  const near = Math.abs(y(p99) - y(median)) < 13;
  for (const [value, name] of near ? [[median, "median"]] : [[median, "median"], [p99, "99 %"]]) {
    if (value > high) continue;
    drawing.append(line(left, y(value), width - right, y(value), "median"),
      label(width - right + 6, y(value) + 4, name));
  }
  for (const token of tokens) {
    const above = token.cycles > high;
    const [cx, cy] = [x(token.index), y(Math.min(token.cycles, high))];
    const data = {
      "data-index": token.index, "data-cycles": token.cycles, "data-outlier": token.outlier,
      class: `dot${token.outlier ? " outlier" : ""}`,
    };
    const dot = above
      ? svg("path", { d: `M${cx - 5} ${cy + 7}L${cx} ${cy}L${cx + 5} ${cy + 7}Z`, ...data })
      : svg("circle", { cx, cy, r: token.outlier ? 4 : 2.1, ...data });
    const rows = [
      [UNIT, count(token.cycles), SOURCES.cycles],
      ["against the median", signed(token.cycles / median - 1), "derived"],
    ];
    if (token.outlier) rows.push(["outlier", token.reason ?? "reason unknown"]);
    drawing.append(mark(dot, `token ${token.index}`, rows));
    if (above) {
      drawing.append(label(cx + 8, cy + 8, `×${digits(token.cycles / median, 2)}`));
    }
  }
  return drawing;
}

function drawTokens() {
  if (!profile.tokens?.length) return byId("tokens").remove();
  const reasons = profile.tokens.filter((token) => token.outlier);
  const known = reasons.filter((token) => token.reason).map(
    (token) => `token ${token.index}: ${token.reason}`);
  byId("tokens").querySelector(".lead").append(
    reasons.length ? ` ${plural(reasons.length, "outlier")} of ${profile.tokens.length}` : "",
    reasons.length ? (known.length ? ` (${known.slice(0, 3).join("; ")}).` : ".") : "");
  picture(byId("strip"), "Cycles of each token", drawStrip);
}

// Growth. A term is a power of the variable, perhaps times its logarithm: `1`, `n`, `n^2 log n`,
// `1/threads`.

function term(form) {
  if (form === "1") return () => 1;
  if (/^1\/\w+$/.test(form)) return (x) => 1 / x;
  const found = /^(?:(\w+)(?:\^(\d+))?)??( ?log \w+)?$/.exec(form);
  if (!found) return null;
  const power = found[1] ? Number(found[2] ?? 1) : 0;
  return (x) => x ** power * (found[3] ? Math.log2(x) : 1);
}

// The law as a function, if it is written in known terms and says what the fit said.
function lawOf(growth) {
  const parts = growth.terms.map(({ form, coefficient }) => [term(form), coefficient]);
  if (parts.some(([each]) => each === null)) return null;
  const law = (n) => sum(parts.map(([each, coefficient]) => coefficient * each(n)));
  const agrees = growth.points.every(
    ({ x, fitted }) => Math.abs(law(x) - fitted) <= 0.005 * Math.abs(fitted));
  return agrees ? law : null;
}

function drawLaw(growth) {
  const points = [...growth.points].sort((a, b) => a.x - b.x);
  const lastX = points.at(-1).x;
  const most = Math.max(...points.flatMap((point) => [point.cycles, point.fitted]));
  const law = lawOf(growth);
  return (width) => {
    const [left, bottom, height] = [50, 34, 190];
    const x = linear(0, lastX, left, width - 8);
    const y = linear(0, 1.06 * most, height - bottom, 6);
    const drawing = svg("svg", {
      width, height, "data-name": growth.name, "data-phase": growth.phase,
      "data-variable": growth.variable,
    });
    for (const tick of ticks(0, 1.06 * most, 4)) {
      drawing.append(line(left, y(tick), width - 8, y(tick), "axis"),
        label(left - 6, y(tick) + 4, count(tick), { "text-anchor": "end" }));
    }
    for (const tick of ticks(0, lastX, width / 80)) {
      drawing.append(label(x(tick), height - bottom + 16, String(tick),
        { "text-anchor": "middle" }));
    }
    drawing.append(label((left + width) / 2, height - 3, growth.variable.replaceAll("_", " "),
      { "text-anchor": "middle" }));
    const curve = law
      ? Array.from({ length: 61 }, (_, n) => points[0].x + ((lastX - points[0].x) * n) / 60)
        .map((n) => [n, law(n)])
      : points.map((point) => [point.x, point.fitted]);
    drawing.append(svg("path", {
      class: "law",
      d: `M${curve.map(([n, cycles]) => `${x(n).toFixed(2)} ${y(cycles).toFixed(2)}`).join("L")}`,
    }));
    for (const point of points) {
      const dot = svg("circle", {
        cx: x(point.x), cy: y(point.cycles), r: 3.6, class: point.held_out ? "held" : "seen",
        "data-x": point.x, "data-cycles": point.cycles, "data-fitted": point.fitted,
        "data-held-out": point.held_out,
      });
      drawing.append(mark(dot, `${growth.variable.replaceAll("_", " ")} ${point.x}`, [
        [UNIT, count(point.cycles), growth.provenance], ["law", count(point.fitted), "derived"],
        ["difference", signed(point.cycles / point.fitted - 1), "derived"],
        ["held out", point.held_out ? "yes" : "no"],
      ]));
    }
    return drawing;
  };
}

function lawText(growth) {
  const parts = growth.terms.map(({ form, coefficient }) => {
    const shown = form === "1" ? "" : form.replace("^2", "²").replace(/^1\//, "/ ");
    return `${count(coefficient)} ${shown}`.trim();
  });
  return parts.join(" + ") || growth.law;
}

function drawGrowth() {
  const growth = (profile.growth ?? []).filter((each) => each.points?.length);
  if (!growth.length) return byId("growth").remove();
  // Totals first, then what takes the largest share of its total.
  const most = (each) => Math.max(...each.points.map((point) => point.cycles));
  const size = (each) => {
    if (each.name === "total") return Infinity;
    const total = growth.find((other) => other.name === "total" && other.phase === each.phase
      && other.variable === each.variable);
    return total ? most(each) / most(total) : 0;
  };
  growth.sort((a, b) => (size(a) === size(b) ? 0 : size(b) - size(a)));
  const panel = (container, each) => {
    const room = html("div");
    container.append(html("figure", { style: "margin:0" },
      html("figcaption", {},
        html("b", { class: "name" }, each.name), ` in ${each.phase}`, from(each.provenance),
        html("div", { class: "muted" }, lawText(each), from("derived")),
        html("div", { class: "muted" }, "median error on held-out points ",
          percent(each.median_error), from("derived"))),
      room));
    picture(room, `Growth of ${each.name} in ${each.phase}`, drawLaw(each));
  };
  const shown = 6;
  growth.slice(0, shown).forEach((each) => panel(byId("laws"), each));
  const details = byId("more-laws");
  if (growth.length <= shown) return details.remove();
  details.querySelector("summary").textContent = `${plural(growth.length - shown, "more law")}`;
  details.addEventListener("toggle", () => {
    const container = details.querySelector(".panels");
    if (!container.childElementCount) growth.slice(shown).forEach((each) => panel(container, each));
  });
}

// What if

function drawChanges() {
  const changes = profile.whatif ?? [];
  if (!changes.length) return byId("whatif").remove();
  const columns = [
    ["time to first token", "time_to_first_token", seconds, profile.time_to_first_token?.median],
    ["time per token", "time_per_token", seconds, profile.time_per_token?.median],
    ["tokens per second", "tokens_per_second", digits, profile.tokens_per_second],
  ];
  const cell = ([name, field, show, now], change) => {
    const band = change[field];
    if (!isNumber(band?.value)) return html("td", {}, "–");
    const values = changes.map((each) => each[field]?.high).filter(isNumber);
    const most = Math.min(Math.max(...values, now ?? 0), 4 * (now ?? Infinity));
    const at = (value) => `${clamp((100 * value) / most, 0, 100)}%`;
    const [low, high] = [clamp(band.low, 0, most), clamp(band.high, 0, most)];
    const drawing = svg("svg", { width: "100%", height: 14, role: "img" },
      svg("title", {}, `${name}: ${show(band.value)}, from ${show(band.low)} to ${show(band.high)}`),
      line("0", 7, "100%", 7, "axis"),
      svg("rect", { x: at(low), width: `${(100 * (high - low)) / most}%`, y: 3, height: 8, rx: 2,
        class: "band" }),
      isNumber(now) ? line(at(now), 0, at(now), 14, "now") : null,
      svg("circle", { cx: at(band.value), cy: 7, r: 3.6, class: "value-mark" }));
    return html("td", {
      class: "wide pair", "data-change": change.change, "data-metric": field,
      "data-value": band.value, "data-low": band.low, "data-high": band.high,
    }, html("div", {}, html("span", {}, show(band.value)),
      html("span", { class: "muted" }, `${show(band.low)} to ${show(band.high)}`)), drawing);
  };
  byId("changes").append(
    html("thead", {}, html("tr", {}, html("th", {}, "change"),
      ...columns.map(([name]) => html("th", {}, name, from("modelled"))),
      html("th", {}, "gain", from("modelled")))),
    html("tbody", {}, changes.map((change) => html("tr", {},
      html("td", {}, html("div", { class: "name" }, change.change),
        html("div", { class: "muted" }, change.meaning)),
      ...columns.map((column) => cell(column, change)),
      html("td", { "data-gain": change.gain_fraction }, signed(change.gain_fraction))))));
}
