// Tables: every moment with its numbers, the clock's accounts, and where the numbers come from.

const PER = UNIT.slice(0, -1);
const COLUMNS = [
  { name: "moment", key: (row) => row.name, text: true },
  { name: UNIT, key: (row) => row.cycles, show: count, from: (row) => row.provenance },
  { name: "waiting", key: (row) => row.waiting_cycles, show: count, from: (row) => row.provenance },
  { name: "share", key: (row) => share(row), show: percent, from: () => "derived" },
  { name: "±", key: (row) => spreadOf(row), show: percent, from: () => "derived",
    title: "half of what lies between the fastest and the slowest repeat" },
  { name: "of limit", key: (row) => row.limit_fraction, show: percent, from: () => SOURCES.limit },
  { name: "bound by", key: (row) => row.bound ?? "–", text: true },
  { name: "limit", key: (row) => row.limit_cycles, show: count, from: () => SOURCES.limit },
  { name: "operations", key: (row) => row.operations, show: count, from: () => SOURCES.operations },
  { name: "bytes", key: (row) => row.bytes, show: bytes, from: () => SOURCES.bytes },
  { name: `ops/${PER}`, key: (row) => row.operations / whole(row), show: count,
    from: () => "derived" },
  { name: `bytes/${PER}`, key: (row) => row.bytes / whole(row), show: count,
    from: () => "derived" },
];

// Half of what lies between the smallest and the largest repeat, as a share.
function spreadOf(row) {
  const members = (row.members ?? [row]).map((moment) => moment.samples ?? []);
  const totals = members[0].map((_, repeat) => sum(members.map((samples) => samples[repeat])));
  if (totals.length < 2) return null;
  return (Math.max(...totals) - Math.min(...totals)) / 2 / (sum(totals) / totals.length);
}

const order = { column: 1, down: true };

function drawMoments() {
  const form = byId("choice");
  const select = (name, options) => html("select", { name, "aria-label": name },
    options.map(([value, text]) => html("option", { value }, text)));
  form.append(
    html("label", {}, "phase ", select("phase", [["decode", "decode"], ["prefill", "prefill"]])),
    html("label", {}, "rows ", select("rows", [["kinds", "summed over layers"],
      ["moments", "every moment"]])),
    html("label", {}, "name ", html("input", { type: "search", name: "filter", size: 18 })),
    html("span", { class: "muted", id: "shown" }));
  form.addEventListener("input", fillMoments);
  form.addEventListener("submit", (event) => event.preventDefault());
  const head = html("tr", {}, COLUMNS.map((column, index) => {
    const button = html("button", { type: "button", title: column.title }, column.name);
    button.addEventListener("click", () => {
      order.down = order.column === index ? !order.down : !column.text;
      order.column = index;
      fillMoments();
    });
    return html("th", { scope: "col", class: column.text ? "left" : null }, button);
  }));
  byId("table").append(html("thead", {}, head), html("tbody"));
  fillMoments();
}

function fillMoments() {
  const form = byId("choice");
  const phase = phases[form.elements.phase.value];
  const wanted = form.elements.filter.value.toLowerCase();
  const all = form.elements.rows.value === "kinds" ? phase.kinds : phase.moments;
  const rows = all.filter((row) => row.name.toLowerCase().includes(wanted));
  const { key } = COLUMNS[order.column];
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true })
    : (a ?? -Infinity) - (b ?? -Infinity));
  rows.sort((a, b) => (order.down ? -1 : 1) * compare(key(a), key(b)));
  const table = byId("table");
  table.tBodies[0].replaceChildren(...rows.map((row) => html("tr", dataOf(row),
    COLUMNS.map((column, index) => {
      if (!column.text) {
        const value = column.key(row);
        return html("td", {}, column.show(value), isNumber(value) ? from(column.from(row)) : null);
      }
      if (index) return html("td", { class: "left" }, column.key(row));
      return html("td", {}, html("i", { class: `swatch ${row.class}`, title: row.class }),
        html("span", { class: "name" }, row.name),
        row.count > 1 ? html("span", { class: "times" }, ` ×${row.count}`) : null);
    }))));
  [...table.tHead.rows[0].cells].forEach((cell, index) => {
    if (index !== order.column) cell.removeAttribute("aria-sort");
    else cell.setAttribute("aria-sort", order.down ? "descending" : "ascending");
  });
  byId("shown").textContent = plural(rows.length, "row");
}

// The clock

const PARTS = [["moments", "matmul"], ["waiting", "waiting"], ["python", "host"],
  ["unaccounted", "rest"]];

const facts = (list, pairs) => list.append(...pairs.filter(([, value]) => value !== null)
  .flatMap(([name, value, kind]) => [html("dt", {}, name), html("dd", {}, value, from(kind))]));

function drawClock() {
  const clock = profile.clock ?? {};
  const gigahertz = (value) => `${digits(value / 1e9, 4)}${THIN}GHz`;
  const names = {
    pmu: "pmu: the processor’s own counters of core cycles",
    "tsc+chain": "tsc+chain: time-stamp ticks, turned into core cycles by a chain of dependent adds",
    cntvct: "cntvct: the system’s counter of time; ticks are not cycles",
  };
  facts(byId("source"), [
    ["source", names[profile.clock_source] ?? profile.clock_source],
    ["its error", isNumber(profile.clock_error_fraction)
      ? `±${percent(profile.clock_error_fraction)}` : null, "measured"],
    ["core clock", isNumber(clock.core_hertz) ? `${gigahertz(clock.core_hertz)}, from `
      + `${gigahertz(clock.core_hertz_low)} to ${gigahertz(clock.core_hertz_high)}` : null,
    "measured"],
    ["tick rate", isNumber(clock.ticks_per_second) ? gigahertz(clock.ticks_per_second) : null,
      "measured"],
    ["one stamp", isNumber(clock.read_cost_seconds) ? seconds(clock.read_cost_seconds) : null,
      "measured"],
    ["own overhead", percent(profile.overhead_fraction), "measured"],
    ["unaccounted", percent(profile.unaccounted_fraction), "derived"],
  ]);
  byId("notes").append(...(clock.notes ?? []).map((note) => html("li", {}, note)));
  drawAccounts();
}

function drawAccounts() {
  const accounts = profile.accounts ?? [];
  if (!accounts.length) return byId("conservation").remove();
  byId("accounts-key").append(...PARTS.map(([name, style]) => swatch(style, name)));
  byId("accounts").append(
    html("thead", {}, html("tr", {}, html("th", {}, "thread"), html("th"),
      ...PARTS.map(([name]) => html("th", {}, name,
        from(name === "unaccounted" ? "derived" : SOURCES.cycles))),
      html("th", {}, "wall", from(SOURCES.cycles)), html("th", {}, "sum / wall", from("derived")))),
    html("tbody", {}, accounts.map((account) => {
      const total = Math.max(account.wall, sum(PARTS.map(([name]) => Math.max(0, account[name]))));
      const bar = svg("svg", { width: "100%", height: 14, role: "img" },
        svg("title", {}, PARTS.map(([name]) =>
          `${name} ${percent(account[name] / account.wall)}`).join(", ")));
      let at = 0;
      for (const [name, style] of PARTS) {
        const length = Math.max(0, account[name]);
        const part = svg("rect", {
          x: `${(100 * at) / total}%`, width: `${(100 * length) / total}%`, height: 14,
          class: style, "data-part": name, "data-cycles": account[name],
        });
        if (name === "waiting") part.style.fill = "url(#hatch-matmul)";
        bar.append(part);
        at += length;
      }
      const adds = sum(PARTS.map(([name]) => account[name])) / account.wall;
      return html("tr", {
        "data-thread": account.thread, "data-phase": account.phase, "data-wall": account.wall,
      }, html("td", {}, `${account.thread} · ${account.phase}`),
      html("td", { class: "wide" }, bar),
      ...PARTS.map(([name]) => html("td", {}, percent(account[name] / account.wall))),
      html("td", {}, count(account.wall)), html("td", {}, `${(100 * adds).toFixed(2)}${THIN}%`));
    })));
}

// Sources

function flat(value) {
  if (value === null || value === undefined) return null;
  if (typeof value !== "object") return String(value);
  if (Array.isArray(value)) return value.map(flat).filter(Boolean).join(", ");
  return Object.entries(value).map(([name, each]) => `${name} ${flat(each)}`).join(", ");
}

function drawSources() {
  facts(byId("provenance"), Object.entries(profile.provenance ?? {})
    .map(([name, text]) => [name.replaceAll("_", " "), String(text)]));
  facts(byId("host"), Object.entries(profile.host ?? {}).map(([name, value]) =>
    [name.replaceAll("_", " "), flat(value)]));
  const roofs = profile.roofs;
  if (!roofs?.levels?.length) return byId("levels").remove();
  const threads = roofs.levels[0].bytes_per_second.map((point) => point[0]);
  const rate = (scaling, number, show) => {
    const point = scaling.find(([each]) => each === number);
    return html("td", {}, point ? show(point[1]) : "–", point ? from(SOURCES.roofs) : null);
  };
  const rows = roofs.levels.map((level) => html("tr", { "data-level": level.name },
    html("td", {}, `read from ${level.name}`),
    html("td", {}, level.num_bytes ? bytes(level.num_bytes) : "–"),
    ...threads.map((number) => rate(level.bytes_per_second, number, (v) => `${bytes(v)}/s`))));
  for (const [unit, scaling] of Object.entries(roofs.operations_per_second)) {
    rows.push(html("tr", { "data-unit": unit },
      html("td", {}, `${unit}, ${roofs.instructions?.[unit] ?? ""} operations`),
      html("td", {}, "–"),
      ...threads.map((number) => rate(scaling, number, (v) => `${count(v)}/s`))));
  }
  byId("levels").append(
    html("thead", {}, html("tr", {}, html("th", {}, "roof"), html("th", {}, "size"),
      ...threads.map((number) => html("th", {}, plural(number, "thread"))))),
    html("tbody", {}, rows));
}
