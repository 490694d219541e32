// The profile's moments, summed: over the layers of a model, and over a phase.

const layerOf = (name) => {
  const found = /^layers\.(\d+)\./.exec(name);
  return found ? Number(found[1]) : null;
};
const kindOf = (name) => name.replace(/^layers\.\d+\./, "layers.*.");
const shortKind = (kind) => kind.replace("layers.*.", "");
const whole = (moment) => moment.cycles + moment.waiting_cycles;
const shareOfLimit = (moment) =>
  isNumber(moment.limit_cycles) && moment.limit_cycles > 0 && whole(moment) > 0
    ? moment.limit_cycles / whole(moment) : null;

function sumUp(kind, members) {
  const first = members[0];
  const add = (field) => sum(members.map((moment) => moment[field] ?? 0));
  const total = {
    name: kind, class: first.class, phase: first.phase, unit: first.unit, count: members.length,
    provenance: first.provenance, members,
  };
  for (const field of ["cycles", "waiting_cycles", "operations", "bytes", "limit_cycles"]) {
    total[field] = add(field);
  }
  const bounds = new Map();
  for (const moment of members) {
    bounds.set(moment.bound, (bounds.get(moment.bound) ?? 0) + whole(moment));
  }
  total.bound = [...bounds].sort((a, b) => b[1] - a[1])[0][0];
  if (members.length === 1) total.limit_cycles = first.limit_cycles;
  total.limit_fraction = members.length === 1 ? first.limit_fraction : shareOfLimit(total);
  return total;
}

function readPhase(name) {
  const moments = profile.moments.filter((moment) => moment.phase === name);
  const groups = new Map();
  for (const moment of moments) {
    const kind = kindOf(moment.name);
    if (!groups.has(kind)) groups.set(kind, []);
    groups.get(kind).push(moment);
  }
  const kinds = [...groups].map(([kind, members]) => sumUp(kind, members));
  const accounted = sum(moments.map(whole));
  const cycles = Math.max(accounted, profile[name]?.cycles ?? 0);
  return { name, moments, kinds, accounted, cycles, rest: cycles - accounted };
}

const phases = { decode: readPhase("decode"), prefill: readPhase("prefill") };
const numLayers = 1 + Math.max(-1, ...profile.moments.map((moment) => layerOf(moment.name) ?? -1));
const coreHertz = profile.clock?.core_hertz;

const classTotals = (phase) => CLASSES.map((name) => {
  const members = phase.moments.filter((moment) => moment.class === name);
  return {
    name, cycles: sum(members.map((moment) => moment.cycles)),
    waiting: sum(members.map((moment) => moment.waiting_cycles)),
  };
}).filter((total) => total.cycles + total.waiting > 0);

// A quantity measured at several numbers of threads, at the number that ran.
function atThreads(scaling, threads) {
  const points = [...scaling].sort((a, b) => a[0] - b[0]);
  const below = points.filter((point) => point[0] <= threads).at(-1) ?? points[0];
  const above = points.find((point) => point[0] >= threads) ?? points.at(-1);
  if (below[0] === above[0]) return below[1];
  return below[1] + ((above[1] - below[1]) * (threads - below[0])) / (above[0] - below[0]);
}

// The rows of a moment's tip, the same in every picture.
function tipRows(moment, phase) {
  const rows = [
    [UNIT, count(moment.cycles), moment.provenance],
    ["waiting", count(moment.waiting_cycles), moment.provenance],
    [`share of ${moment.phase}`, percent(whole(moment) / phase.cycles), "derived"],
  ];
  if (isNumber(coreHertz)) rows.splice(2, 0, ["time", seconds(whole(moment) / coreHertz), "derived"]);
  if (isNumber(moment.limit_fraction)) {
    rows.push(["share of limit", percent(moment.limit_fraction), SOURCES.limit]);
    rows.push(["bound by", moment.bound ?? "–", SOURCES.limit]);
  }
  return rows;
}

const dataOf = (moment) => ({
  "data-name": moment.name, "data-phase": moment.phase, "data-cycles": moment.cycles,
  "data-waiting": moment.waiting_cycles, "data-limit": moment.limit_fraction,
});
