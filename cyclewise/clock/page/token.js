// One token: the ring of its moments, the moments summed over layers, and the threads side by side.

function sector(from, to, inner, outer) {
  const end = Math.min(to, from + 2 * Math.PI - 1e-4);
  const at = (angle, radius) =>
    `${(radius * Math.sin(angle)).toFixed(3)} ${(-radius * Math.cos(angle)).toFixed(3)}`;
  const large = end - from > Math.PI ? 1 : 0;
  return `M${at(from, inner)}L${at(from, outer)}A${outer} ${outer} 0 ${large} 1 ${at(end, outer)}`
    + `L${at(end, inner)}A${inner} ${inner} 0 ${large} 0 ${at(from, inner)}Z`;
}

function drawHatches() {
  byId("hatches").append(...CLASSES.map((name) =>
    svg("pattern", {
      id: `hatch-${name}`, width: 5, height: 5, patternUnits: "userSpaceOnUse",
      patternTransform: "rotate(45)",
    }, svg("line", { x1: 1, y1: 0, x2: 1, y2: 5, class: `hatch ${name}` }))));
}

function drawRing(width) {
  const phase = phases.decode;
  const size = Math.min(width, 430);
  const outer = size / 2 - 2;
  const ring = svg("svg", {
    width: size, height: size, viewBox: `${-size / 2} ${-size / 2} ${size} ${size}`, class: "ring",
  });
  const [moments, layers, classes] = [svg("g"), svg("g"), svg("g")];
  const turn = (2 * Math.PI) / phase.cycles;
  const bands = new Map();
  let at = 0;
  for (const moment of phase.moments) {
    const layer = layerOf(moment.name);
    const [start, middle, end] = [at, at + moment.cycles, at + whole(moment)];
    const arc = (from_, to, extra) => svg("path", {
      d: sector(from_ * turn, to * turn, 0.72 * outer, outer), "data-kind": kindOf(moment.name),
      ...extra,
    });
    const work = arc(start, middle, { class: `arc ${moment.class}`, ...dataOf(moment) });
    moments.append(mark(work, moment.name, tipRows(moment, phase)));
    if (moment.waiting_cycles > 0) {
      const wait = arc(middle, end, { fill: `url(#hatch-${moment.class})`, class: "waits" });
      wait.style.fill = `url(#hatch-${moment.class})`;
      tips.set(wait, tips.get(work));
      moments.append(wait);
    }
    if (layer !== null) bands.set(layer, [bands.get(layer)?.[0] ?? start, end]);
    at = end;
  }
  if (phase.rest > 0) {
    const rest = svg("path", {
      d: sector(at * turn, phase.cycles * turn, 0.72 * outer, outer), class: "arc rest",
      "data-name": "unaccounted", "data-cycles": phase.rest, "data-kind": "unaccounted",
    });
    moments.append(mark(rest, "unaccounted", [
      [UNIT, count(phase.rest), "derived"],
      ["share of token", percent(phase.rest / phase.cycles), "derived"],
    ]));
  }
  for (const [layer, [start, end]] of bands) {
    const band = svg("path", {
      d: sector(start * turn, end * turn, 0.675 * outer, 0.7 * outer),
      class: `layer ${layer % 2 ? "odd" : ""}`,
    });
    layers.append(band);
  }
  at = 0;
  for (const total of classTotals(phase)) {
    const end = at + total.cycles + total.waiting;
    classes.append(svg("path", {
      d: sector(at * turn, end * turn, 0.61 * outer, 0.65 * outer), class: total.name,
      "data-class": total.name, "data-cycles": total.cycles, "data-waiting": total.waiting,
    }));
    at = end;
  }
  const time = profile.time_per_token?.median ?? phase.cycles / coreHertz;
  const centre = svg("g", { class: "centre", "data-seconds": time, "data-cycles": phase.cycles },
    label(0, 4, seconds(time), { class: "value" }), label(0, 28, "per token"),
    label(0, 48, `${count(phase.cycles)} ${UNIT}`));
  ring.append(moments, layers, classes, centre);
  return ring;
}

function pick(kind) {
  const ring = byId("ring").firstElementChild;
  if (!ring) return;
  ring.classList.toggle("picking", kind !== null);
  for (const arc of ring.querySelectorAll("[data-kind]")) {
    arc.classList.toggle("picked", arc.dataset.kind === kind);
  }
}

function drawKinds() {
  const phase = phases.decode;
  const kinds = [...phase.kinds].sort((a, b) => whole(b) - whole(a));
  const most = Math.max(...kinds.map(whole), phase.rest);
  const bar = (work, waiting, group) => {
    const drawing = svg("svg", { width: "100%", height: 10, "aria-hidden": "true" });
    const part = (start, length) => ({
      x: `${(100 * start) / most}%`, width: `${(100 * length) / most}%`, height: 10, rx: 1,
    });
    drawing.append(svg("rect", { ...part(0, work), class: group }));
    if (waiting > 0) {
      const hatched = svg("rect", part(work, waiting));
      hatched.style.fill = `url(#hatch-${group})`;
      drawing.append(hatched);
    }
    return drawing;
  };
  const row = (kind, name, times, cells) => html("tr", { tabindex: "0", "data-kind": kind },
    html("td", {}, html("span", { class: "name" }, name),
      times > 1 ? html("span", { class: "times" }, ` ×${times}`) : null),
    ...cells);
  const rows = kinds.map((kind) => row(kind.name, shortKind(kind.name), kind.count, [
    html("td", { class: "wide" }, bar(kind.cycles, kind.waiting_cycles, kind.class)),
    html("td", { "data-cycles": whole(kind) }, count(whole(kind))),
    html("td", {}, percent(whole(kind) / phase.cycles)),
    html("td", {}, percent(kind.limit_fraction)),
  ]));
  if (phase.rest > 0) {
    rows.push(row("unaccounted", "unaccounted", 1, [
      html("td", { class: "wide" }, bar(phase.rest, 0, "rest")),
      html("td", { "data-cycles": phase.rest }, count(phase.rest)),
      html("td", {}, percent(phase.rest / phase.cycles)), html("td", {}, "–"),
    ]));
  }
  const table = byId("kinds");
  table.append(
    html("thead", {}, html("tr", {}, html("th", {}, "moment"), html("th", { class: "wide" }),
      html("th", {}, UNIT, from(SOURCES.cycles)), html("th", {}, "share", from("derived")),
      html("th", {}, "of limit", from(SOURCES.limit)))),
    html("tbody", {}, rows));
  for (const type of ["pointerover", "focusin"]) {
    table.addEventListener(type, (event) => pick(event.target.closest("tr")?.dataset.kind ?? null));
  }
  for (const type of ["pointerleave", "focusout"]) table.addEventListener(type, () => pick(null));
}

function drawToken() {
  drawHatches();
  byId("classes").append(
    ...classTotals(phases.decode).map((total) => swatch(total.name, CLASS_NAMES[total.name])),
    swatch("waiting", "waiting for other threads"), swatch("rest", "unaccounted"));
  picture(byId("ring"), "One token as a ring of moments", drawRing);
  drawKinds();
  drawLanes();
}

// The threads side by side. The timeline has no names: its rows are the program's moments.

function drawLanes() {
  const threads = profile.timeline?.threads ?? [];
  const moments = phases[profile.timeline?.phase]?.moments.filter((m) => m.class !== "host") ?? [];
  if (!threads.length || threads.some((lane) => lane.length !== moments.length)) {
    return byId("lanes").remove();
  }
  const end = Math.max(...threads.flat().map(([start, work, wait]) => start + work + wait));
  const height = clamp(240 / threads.length, 6, 26);
  const lanesHeight = threads.length * (height + 3);
  const input = byId("layer");
  const span = () => {
    const inside = moments.map((moment, row) => [layerOf(moment.name), row])
      .filter(([layer]) => layer === Number(input.value)).map(([, row]) => row);
    const pieces = threads.flatMap((lane) => inside.map((row) => lane[row]))
      .filter(([, work, wait]) => work + wait > 0);
    return [Math.min(...pieces.map((piece) => piece[0])), Math.max(...pieces.map(sum))];
  };
  const frame = (width, low, high) => {
    const left = threads.length > 1 ? 52 : 8;
    const x = linear(low, high, left, width - 2);
    const drawing = svg("svg", { width, height: lanesHeight + 24 });
    for (const tick of ticks(low, high, width / 110)) {
      drawing.append(line(x(tick), 0, x(tick), lanesHeight, "axis"),
        label(x(tick), lanesHeight + 16, count(tick), { "text-anchor": "middle" }));
    }
    if (left > 8 && height >= 11) {
      threads.forEach((_, thread) => drawing.append(
        label(0, thread * (height + 3) + height / 2 + 4, `thread ${thread}`)));
    }
    return [drawing, x];
  };

  picture(byId("overview"), "One token, thread by thread", (width) => {
    const [drawing, x] = frame(width, 0, end);
    threads.forEach((lane, thread) => {
      const top = thread * (height + 3);
      const box = (start, length) =>
        `M${x(start).toFixed(2)} ${top}H${x(start + length).toFixed(2)}v${height}H${x(start).toFixed(2)}z`;
      for (const group of CLASSES) {
        const rows = lane.filter((_, row) => moments[row].class === group);
        const work = rows.map(([start, length]) => (length > 0 ? box(start, length) : "")).join("");
        const waits = rows.map(([start, length, wait]) => (wait > 0 ? box(start + length, wait) : ""));
        const hatched = svg("path", { d: waits.join("") });
        hatched.style.fill = `url(#hatch-${group})`;
        drawing.append(svg("path", { d: work, class: group }), hatched);
      }
    });
    if (numLayers) {
      const [low, high] = span();
      drawing.append(svg("rect", {
        class: "window", x: x(low) - 1, y: -4, width: x(high) - x(low) + 2, height: lanesHeight + 5,
      }));
    }
    return drawing;
  });
  if (!numLayers) return byId("layer").closest("p").remove();

  const zoom = picture(byId("zoom"), "One layer, thread by thread", (width) => {
    const [low, high] = span();
    const [drawing, x] = frame(width, low, high);
    byId("layer-name").textContent = `${input.value} of ${numLayers - 1}`;
    threads.forEach((lane, thread) => lane.forEach(([start, work, wait], row) => {
      const moment = moments[row];
      if (layerOf(moment.name) !== Number(input.value)) return;
      const y = thread * (height + 3);
      const rect = svg("rect", {
        x: x(start), y, width: Math.max(0.4, x(start + work) - x(start)), height,
        class: `work ${moment.class}`, "data-name": moment.name, "data-thread": thread,
        "data-cycles": work, "data-waiting": wait,
      });
      drawing.append(mark(rect, moment.name, [
        ["thread", String(thread)], [UNIT, count(work), SOURCES.cycles],
        ["waiting", count(wait), SOURCES.cycles],
      ]));
      const name = shortKind(kindOf(moment.name));
      if (height >= 14 && x(start + work) - x(start) > 6.9 * name.length + 8) {
        drawing.append(label(x(start) + 5, y + height / 2 + 4, name, { class: "inside name" }));
      }
      if (wait > 0) {
        const hatched = svg("rect", {
          x: x(start + work), y, width: x(start + work + wait) - x(start + work), height,
        });
        hatched.style.fill = `url(#hatch-${moment.class})`;
        drawing.append(hatched);
      }
    }));
    return drawing;
  });
  input.max = numLayers - 1;
  const redrawWindow = () => {
    const window_ = byId("overview").querySelector(".window");
    const width = byId("overview").clientWidth;
    const x = linear(0, end, threads.length > 1 ? 52 : 8, width - 2);
    const [low, high] = span();
    fill(window_, { x: x(low) - 1, width: x(high) - x(low) + 2 }, []);
  };
  input.addEventListener("input", () => { zoom(); redrawWindow(); });
}
