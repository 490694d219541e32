// The roofline (Williams, Waterman and Patterson, 2009), in operations per cycle and per byte.
// Memory's roof is the one read within the run, as limits are: what others leave of it changes.

function measuredRoofs() {
  const { roofs, settings } = profile;
  return {
    levels: roofs.levels.map((level) => {
      const now = level.num_bytes ? null : roofs.memory_bytes_per_second_within_run;
      const perSecond = now ?? atThreads(level.bytes_per_second, settings.threads);
      return { name: level.name, rate: perSecond / roofs.core_hertz, perSecond };
    }),
    units: Object.entries(roofs.operations_per_second).map(([unit, scaling]) => {
      const perSecond = atThreads(scaling, settings.threads);
      const instruction = roofs.instructions?.[unit];
      return { name: unit, rate: perSecond / roofs.core_hertz, perSecond, instruction };
    }),
  };
}

function place(moment) {
  return { x: moment.operations / moment.bytes, y: moment.operations / whole(moment) };
}

function drawRoofline(width) {
  const { levels, units } = measuredRoofs();
  const drawable = (moment) => moment.operations > 0 && moment.bytes > 0 && whole(moment) > 0;
  const kinds = Object.values(phases).flatMap((phase) => phase.kinds.filter(drawable));
  const singles = kinds.flatMap((kind) => (kind.count > 1 ? kind.members.filter(drawable) : []));
  const spots = [...kinds, ...singles].map(place);
  const top = Math.max(...units.map((unit) => unit.rate));
  const lowX = Math.min(0.1, ...spots.map((spot) => spot.x)) / 1.6;
  const highX = Math.max(20, ...spots.map((spot) => spot.x)) * 2;
  const lowY = Math.min(...spots.map((spot) => spot.y), top / 50) / 2;
  const highY = Math.max(top, ...spots.map((spot) => spot.y)) * 2;
  const [left, bottom, height] = [46, 40, clamp(0.52 * width, 340, 520)];
  const x = logarithmic(lowX, highX, left, width - 8);
  const y = logarithmic(lowY, highY, height - bottom, 8);
  const drawing = svg("svg", { width, height });
  const decades = (low, high) => {
    const first = Math.ceil(Math.log10(low) - 1e-9);
    const number = Math.floor(Math.log10(high) + 1e-9) - first + 1;
    return Array.from({ length: Math.max(0, number) }, (_, n) => Number(`1e${first + n}`));
  };
  for (const value of decades(lowX, highX)) {
    drawing.append(line(x(value), 8, x(value), height - bottom, "axis"),
      label(x(value), height - bottom + 16, String(value), { "text-anchor": "middle" }));
  }
  for (const value of decades(lowY, highY)) {
    drawing.append(line(left, y(value), width - 8, y(value), "axis"),
      label(left - 6, y(value) + 4, String(value), { "text-anchor": "end" }));
  }
  drawing.append(
    label((left + width) / 2, height - 4, "operations per byte", { "text-anchor": "middle" }),
    label(0, 0, `operations per ${UNIT.slice(0, -1)}`, {
      transform: `translate(11 ${(height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle",
    }));

  // Roofs
  for (const level of levels) {
    const start = Math.max(lowX, lowY / level.rate);
    const end = Math.min(highX, top / level.rate);
    const angle = (Math.atan2(y(end * level.rate) - y(start * level.rate), x(end) - x(start)) * 180)
      / Math.PI;
    const roof = line(x(start), y(start * level.rate), x(end), y(end * level.rate), "roof level");
    fill(roof, { "data-roof": level.name, "data-rate": level.rate }, []);
    const text = `${level.name} ${digits(level.rate)} B/${UNIT.slice(0, -1)}`;
    drawing.append(mark(roof, `read from ${level.name}`, [
      ["bandwidth", `${bytes(level.perSecond)}/s`, SOURCES.roofs],
      [`bytes per ${UNIT.slice(0, -1)}`, digits(level.rate), "derived"],
    ]), label(0, -4, text, {
      transform: `translate(${x(start) + 10} ${y(start * level.rate) - 9}) rotate(${angle})`,
    }));
  }
  for (const unit of units) {
    const start = Math.max(lowX, unit.rate / Math.max(...levels.map((level) => level.rate)));
    const roof = line(x(start), y(unit.rate), width - 8, y(unit.rate), "roof");
    fill(roof, { "data-roof": unit.name, "data-rate": unit.rate }, []);
    const instruction = unit.instruction ? ` (${unit.instruction})` : "";
    drawing.append(mark(roof, `${unit.name}${instruction}`, [
      ["rate", `${count(unit.perSecond)} operations/s`, SOURCES.roofs],
      [`per ${UNIT.slice(0, -1)}`, digits(unit.rate), "derived"],
    ]), label(width - 10, y(unit.rate) - 5, `${unit.name} ${digits(unit.rate)}${instruction}`,
      { "text-anchor": "end" }));
  }

  // Moments
  const symbol = (moment, radius, name) => {
    const spot = place(moment);
    const [cx, cy] = [x(spot.x), y(spot.y)];
    const data = { ...dataOf(moment), "data-x": spot.x, "data-y": spot.y };
    const style = `${name} ${moment.phase} ${moment.class}`;
    if (moment.phase === "decode") return svg("circle", { cx, cy, r: radius, class: style, ...data });
    const r = 1.18 * radius;
    const points = `${cx},${cy - r} ${cx + r},${cy} ${cx},${cy + r} ${cx - r},${cy}`;
    return svg("polygon", { points, class: style, ...data });
  };
  for (const moment of singles) drawing.append(symbol(moment, 1.8, "single"));
  const named = [];
  for (const kind of [...kinds].sort((a, b) => share(b) - share(a))) {
    const spot = place(kind);
    const radius = 4 + 15 * Math.sqrt(share(kind));
    if (isNumber(kind.limit_fraction) && kind.limit_fraction > 0) {
      const limit = y(spot.y / kind.limit_fraction);
      drawing.append(line(x(spot.x), y(spot.y), x(spot.x), limit, `reach ${kind.class}`),
        line(x(spot.x) - 5, limit, x(spot.x) + 5, limit, `reach ${kind.class}`));
    }
    const rows = [
      ["phase", kind.phase], ...tipRows(kind, phases[kind.phase]),
      ["operations per byte", digits(spot.x), SOURCES.operations],
      [`operations per ${UNIT.slice(0, -1)}`, digits(spot.y), "derived"],
    ];
    drawing.append(mark(symbol(kind, radius, "point"), kind.name, rows));
    named.push({ text: shortKind(kind.name), cx: x(spot.x), cy: y(spot.y), radius });
  }
  const roofNames = units.map((unit) => ({
    left: width - 150, right: width, top: y(unit.rate) - 16, bottom: y(unit.rate) + 1,
  }));
  drawing.append(...namesOf(named.slice(0, 12), roofNames, width));
  return drawing;
}

// The names of points, largest first, each where it covers no point and no other name.
function namesOf(points, covered, width) {
  const taken = [...covered, ...points.map(({ cx, cy, radius }) =>
    ({ left: cx - radius, right: cx + radius, top: cy - radius, bottom: cy + radius }))];
  const found = [];
  for (const { text, cx, cy, radius } of points) {
    const size = 6.7 * text.length;
    const beside = [
      [cx + radius + 4, cy], [cx - radius - 4 - size, cy], [cx - size / 2, cy - radius - 9],
      [cx - size / 2, cy + radius + 9],
    ];
    const spot = beside.map(([left, middle]) =>
      ({ left, right: left + size, top: middle - 6, bottom: middle + 6 }))
      .find((box) => box.left > 50 && box.right < width && taken.every((other) =>
        box.right < other.left || box.left > other.right
        || box.bottom < other.top || box.top > other.bottom));
    if (spot) {
      taken.push(spot);
      found.push(label(spot.left, spot.bottom - 2, text, { class: "strong name" }));
    }
  }
  return found;
}

const share = (kind) => whole(kind) / phases[kind.phase].cycles;

function drawRooflineSection() {
  if (!profile.roofs?.levels?.length || !profile.moments.some((moment) => moment.operations > 0)) {
    return byId("roofline").remove();
  }
  const shape = (node) => svg("svg", { width: 14, height: 14, "aria-hidden": "true" }, node);
  byId("roofline-key").append(
    html("span", {}, shape(svg("circle", { cx: 7, cy: 7, r: 5, class: "rest" })), "decode"),
    html("span", {}, shape(svg("polygon", { points: "7,1 13,7 7,13 1,7", class: "rest" })),
      "prefill"),
    ...CLASSES.slice(0, 3).map((name) => swatch(name, CLASS_NAMES[name])),
    html("span", {}, `roofs of ${plural(profile.settings.threads, "thread")}`, from(SOURCES.roofs)),
    html("span", {}, "operations and bytes", from(SOURCES.operations)));
  picture(byId("roofs"), "Roofline", drawRoofline);
}
