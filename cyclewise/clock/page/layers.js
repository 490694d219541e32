// The heat map: layers across, the moments of a layer down, share of limit as colour.

function drawHeat(phase) {
  const inLayers = phase.kinds.filter((kind) => kind.name.startsWith("layers.*."));
  const outside = phase.kinds.filter((kind) => kind.class !== "host" && !inLayers.includes(kind));
  const most = Math.max(...[...inLayers, ...outside].map(whole));
  return (width) => {
    const narrow = width < 640;
    const left = narrow ? 152 : 182;
    const right = narrow ? 88 : 190;
    const rowHeight = 19;
    const cellWidth = (width - left - right) / Math.max(1, numLayers);
    const rows = [...inLayers, ...outside];
    const gap = 22;
    const rowTop = (row) => row * rowHeight + (row >= inLayers.length ? gap : 0);
    const height = rowTop(rows.length) + (outside.length ? 4 : 20);
    const drawing = svg("svg", { width, height });
    rows.forEach((kind, row) => {
      const y = rowTop(row);
      drawing.append(label(left - 8, y + 13, shortKind(kind.name),
        { "text-anchor": "end", class: `strong name ${narrow ? "small" : ""}` }));
      for (const moment of kind.members) {
        const share = moment.limit_fraction;
        const layer = layerOf(moment.name) ?? 0;
        const cell = svg("rect", {
          x: left + layer * cellWidth + 0.5, y: y + 0.5,
          width: Math.max(0.5, cellWidth - (cellWidth > 5 ? 1 : 0)), height: rowHeight - 1,
          class: isNumber(share) ? "cell" : "cell none", "data-layer": layerOf(moment.name),
          ...dataOf(moment),
        });
        cell.style.setProperty("--share", `${(100 * clamp(share ?? 0, 0, 1)).toFixed(1)}%`);
        drawing.append(mark(cell, moment.name, tipRows(moment, phase)));
      }
      const at = width - right + 12;
      drawing.append(label(at + 34, y + 13, percent(kind.limit_fraction),
        { class: "strong", "text-anchor": "end" }));
      if (narrow) {
        drawing.append(label(width, y + 13, percent(whole(kind) / phase.cycles),
          { "text-anchor": "end" }));
        return;
      }
      const length = (whole(kind) / most) * (right - 12 - 44 - 42);
      drawing.append(
        svg("rect", { x: at + 44, y: y + 5, width: length, height: rowHeight - 10,
          class: kind.class }),
        label(at + 50 + length, y + 13, percent(whole(kind) / phase.cycles)));
    });
    const foot = inLayers.length * rowHeight + 13;
    const every = Math.ceil(26 / cellWidth);
    for (let layer = 0; layer < numLayers; layer += [1, 2, 5, 10, 20, 50].find((n) => n >= every)) {
      drawing.append(label(left + (layer + 0.5) * cellWidth, foot, String(layer),
        { "text-anchor": "middle" }));
    }
    return drawing;
  };
}

function drawHeatMaps() {
  byId("heat-key").append(
    html("span", {}, "0 %", html("i", { class: "ramp" }), "100 % of limit", from(SOURCES.limit)),
    html("span", {}, "at the right: share of limit over all layers, share of the phase"));
  for (const phase of Object.values(phases)) {
    const container = byId(`heat-${phase.name}`);
    if (!phase.moments.some((moment) => moment.class !== "host")) {
      container.previousElementSibling.remove();
      container.remove();
    } else {
      picture(container, `Share of limit in ${phase.name}`, drawHeat(phase));
    }
  }
}
