// The plot of the Pareto front: trials, winner, baselines and ablations, loss against cost.
"use strict";

function hover(one) {
  const said = [
    `<b>trial ${one.trial}</b> ${escaped(one.outcome)}`,
    wrapped(one.words),
    `loss ${nats(lossOf(one))}, ${short(flopsOf(one))} ${known(executedOf(one)) && MEASURED ? "executed" : "nominal"} FLOPs/token, ${parameters(one.params)} parameters`,
  ];
  return said.join("<br>");
}
const points = (some, more) => ({
  type: "scatter",
  mode: "markers",
  hoverinfo: "text",
  text: some.map(hover),
  x: some.map(flopsOf),
  y: some.map(lossOf),
  customdata: some.map((one) => `trial-${one.trial}`),
  ...more,
});

function frontPicture() {
  const third = R.axes.find((axis) => axis !== "loss" && axis !== "flops");
  const stopped = R.trials.filter((one) => !rank.has(one.trial) && one.outcome !== "reused" && known(lossOf(one)));
  const best = ranked.filter((one) => front.has(one.trial)).sort((a, b) => flopsOf(a) - flopsOf(b));
  const tone = third && {
    color: ranked.map((one) => one.values[third]),
    colorscale: "Cividis",
    reversescale: true,
    showscale: true,
    colorbar: { title: { text: axisName(third), side: "right" }, thickness: 12, outlinewidth: 0 },
  };
  const data = [
    points(stopped, { name: "stopped early", marker: { color: colour("faint"), size: 6, opacity: 0.8 } }),
    points(ranked, {
      name: "trial",
      marker: {
        color: colour("accent"),
        size: 9,
        line: { color: colour(third ? "soft" : "paper"), width: 1 },
        ...tone,
      },
    }),
    points(best, {
      name: "front",
      mode: third ? "markers" : "lines+markers",
      line: { shape: "hv", color: colour("accent"), width: 2 },
      marker: { symbol: "circle-open", size: 14, color: colour("accent"), line: { width: 2 } },
    }),
    ...["ablation", "baseline", "winner"].flatMap(entryPoints),
  ];
  const own = trial.get(R.winner);
  if (!winner && own)
    data.push(points([own], { name: "winner", marker: { symbol: "star", size: 18, color: colour("winner") } }));
  return {
    data,
    layout: {
      xaxis: flopsAxis(data),
      yaxis: {
        title: { text: innerWidth < 560 ? "held-out loss, nats" : axisName("loss") + ", nats" },
        range: lossRange(stopped),
      },
    },
  };
}

// One series for each baseline, so that the legend names it; where there is room a label does, too.
const SYMBOLS = ["square", "cross", "x", "triangle-up"];
function entryPoints(role) {
  const some = R.entries
    .map((entry, i) => [entry, i])
    .filter(([entry]) => entry.role === role && finite(entry.objective).length);
  const groups = role === "baseline" ? some.map((one) => [one]) : some.length ? [some] : [];
  return groups.map((group, i) => entrySeries(role, group, SYMBOLS[i % SYMBOLS.length]));
}

function entrySeries(role, some, symbol) {
  const losses = some.map(([entry]) => finite(entry.objective));
  const middle = losses.map(mean);
  const x = some.map(([entry, i]) => flopsOf(entry) * (1 + 0.012 * before(i)));
  const mark = { winner: ["star", 18], baseline: [symbol, 10], ablation: ["diamond", 9] }[role];
  const labelled = role === "baseline" && innerWidth >= 900;
  return {
    type: "scatter",
    mode: labelled ? "markers+text" : "markers",
    text: some.map(([entry]) => (labelled ? escaped(entry.name) : "")),
    textposition: x.map((at) => (at > middleOfPlot() ? "bottom left" : "bottom right")),
    textfont: { size: 12, color: colour(role), shadow: "auto" },
    hoverinfo: "text",
    name: { winner: "winner", ablation: "ablations" }[role] || escaped(some[0][0].name),
    x,
    y: middle,
    customdata: some.map(([, i]) => `entry-${i}`),
    error_y: {
      type: "data",
      symmetric: false,
      array: losses.map((l, i) => Math.max(...l) - middle[i]),
      arrayminus: losses.map((l, i) => middle[i] - Math.min(...l)),
      color: colour(role),
      thickness: 1.5,
    },
    hovertext: some.map(
      ([entry], i) =>
        `<b>${escaped(entry.name)}</b><br>${wrapped(entry.words)}<br>loss ${nats(middle[i])} over ${losses[i].length} seeds, ${bothFlops(entry)}`,
    ),
    marker: { symbol: mark[0], size: mark[1], color: colour(role), line: { color: colour("paper"), width: 1 } },
  };
}

function bothFlops(one) {
  const executed = executedOf(one);
  const nominal = `${short(one.flops_per_token)} nominal FLOPs/token`;
  return known(executed) ? `${short(executed)} executed, ${nominal}` : nominal;
}

// A label stands on the side of its point where there is more room.
function middleOfPlot() {
  const all = [...ranked, ...R.entries].map(flopsOf);
  return (Math.min(...all) + Math.max(...all)) / 2;
}

// Entries of equal FLOPs are drawn side by side, because their bars would hide one another.
function before(i) {
  const own = flopsOf(R.entries[i]);
  return R.entries.slice(0, i).filter((entry) => Math.abs(flopsOf(entry) - own) < 0.01 * own).length;
}

function flopsAxis(data) {
  const all = data.flatMap((trace) => trace.x);
  const wide = Math.max(...all) > 8 * Math.min(...all);
  return {
    title: { text: axisName("flops") + ", full size" },
    type: wide ? "log" : "linear",
    exponentformat: "SI",
    dtick: wide ? "D2" : undefined,
  };
}

// Trials that were stopped after a few steps lie far above the others. A double click shows them all.
function lossRange(stopped) {
  const shown = [...ranked.map(lossOf), ...R.entries.flatMap((entry) => finite(entry.objective))];
  if (!shown.length) return undefined;
  const low = Math.min(...shown),
    high = Math.max(...shown);
  const room = Math.max(high - low, 1e-3);
  const top = Math.max(
    high + 0.12 * room,
    Math.min(Math.max(high, ...stopped.map(lossOf)) + 0.05 * room, high + 0.8 * room),
  );
  return [low - 0.12 * room, top];
}
