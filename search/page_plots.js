// The pictures that plotly draws (front, curves, trust), and the parallel coordinates.
"use strict";

// plotly reads markup and entities in its texts, in some of them twice: a space of no width makes
// them mere text
const escaped = (text) => String(text).replace(/[<&]/g, "$&\u200b");
// nor does it break lines
function wrapped(text, width = 58) {
  const lines = [""];
  for (const word of String(text).split(" ")) {
    if (lines[lines.length - 1].length + word.length > width) lines.push("");
    lines[lines.length - 1] += word + " ";
  }
  return lines.map((line) => escaped(line.trim())).join("<br>");
}

const drawn = new Map();
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    seen.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "400px" });

// Drawn when it comes near the window: 300 trials in all pictures at once take seconds.
function plot(node, build) {
  drawn.set(node, build);
}

// plotly is the last script, so that what needs no pictures is there before them
addEventListener("DOMContentLoaded", () => {
  const needs = "This picture needs plotly: pip install 'archdsl[plots]' and run the command again.";
  for (const node of drawn.keys()) {
    if (window.Plotly) seen.observe(node);
    else node.replaceChildren(el("p", { class: "absent soft" }, needs));
  }
});

async function draw(node) {
  const { data, layout } = drawn.get(node)();
  const narrow = node.clientWidth < 560;
  const axis = { gridcolor: colour("line"), linecolor: colour("faint"), zeroline: false, automargin: true, title: { standoff: 10 } };
  const look = {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("soft") },
    margin: { l: 56, r: 12, t: 12, b: 48 },
    // a finger that moves over the picture scrolls the page
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    legend: { orientation: "h", yanchor: "bottom", y: 1.01, x: 0, font: { size: narrow ? 11 : 13 } },
    modebar: { bgcolor: "transparent", color: colour("soft"), activecolor: colour("ink") },
    hoverlabel: { bgcolor: colour("raised"), bordercolor: colour("faint"), font: { color: colour("ink") }, align: "left" },
    ...layout, xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
  };
  await Plotly.react(node, data, look, { displaylogo: false, responsive: true, displayModeBar: narrow ? false : "hover", modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] });
  if (node.dataset.drawn) return;
  node.dataset.drawn = "yes";
  node.on("plotly_click", (event) => {
    const target = event.points[0].customdata;
    if (target) location.hash = target;
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const node of drawn.keys()) if (node.dataset.drawn) draw(node);
});

function hover(one) {
  const said = [`<b>trial ${one.trial}</b> ${escaped(one.outcome)}`, wrapped(one.words), `loss ${nats(lossOf(one))}, ${short(flopsOf(one))} FLOPs/token, ${parameters(one.params)} parameters`];
  return said.join("<br>");
}
const points = (some, more) => ({
  type: "scatter", mode: "markers", hoverinfo: "text", text: some.map(hover),
  x: some.map(flopsOf), y: some.map(lossOf), customdata: some.map((one) => `trial-${one.trial}`), ...more,
});

function frontPicture() {
  const third = R.axes.find((axis) => axis !== "loss" && axis !== "flops");
  const stopped = R.trials.filter((one) => !rank.has(one.trial) && one.outcome !== "reused" && known(lossOf(one)));
  const best = ranked.filter((one) => front.has(one.trial)).sort((a, b) => flopsOf(a) - flopsOf(b));
  const tone = third && { color: ranked.map((one) => one.values[third]), colorscale: "Cividis", reversescale: true, showscale: true, colorbar: { title: { text: axisName(third), side: "right" }, thickness: 12, outlinewidth: 0 } };
  const data = [
    points(stopped, { name: "stopped early", marker: { color: colour("faint"), size: 6, opacity: 0.8 } }),
    points(ranked, { name: "trial", marker: { color: colour("accent"), size: 9, line: { color: colour(third ? "soft" : "paper"), width: 1 }, ...tone } }),
    points(best, { name: "front", mode: third ? "markers" : "lines+markers", line: { shape: "hv", color: colour("accent"), width: 2 }, marker: { symbol: "circle-open", size: 14, color: colour("accent"), line: { width: 2 } } }),
    ...["ablation", "control", "winner"].flatMap(contestants),
  ];
  const own = trial.get(R.winner);
  if (!winner && own) data.push(points([own], { name: "winner", marker: { symbol: "star", size: 18, color: colour("winner") } }));
  return { data, layout: { xaxis: flopsAxis(data), yaxis: { title: { text: innerWidth < 560 ? "held-out loss, nats" : axisName("loss") + ", nats" }, range: lossRange(stopped) } } };
}

function contestants(role) {
  const some = R.entries.map((entry, i) => [entry, i]).filter(([entry]) => entry.role === role && finite(entry.objective).length);
  if (!some.length) return [];
  const losses = some.map(([entry]) => finite(entry.objective));
  const middle = losses.map(mean);
  const mark = { winner: ["star", 18], control: ["square", 10], ablation: ["diamond", 9] }[role];
  return [{
    type: "scatter", mode: "markers", hoverinfo: "text", name: role === "winner" ? "winner" : `${role}s`,
    x: some.map(([entry, i]) => entry.flops_per_token * (1 + 0.012 * before(i))), y: middle, customdata: some.map(([, i]) => `entry-${i}`),
    error_y: { type: "data", symmetric: false, array: losses.map((l, i) => Math.max(...l) - middle[i]), arrayminus: losses.map((l, i) => middle[i] - Math.min(...l)), color: colour(role), thickness: 1.5 },
    text: some.map(([entry], i) => `<b>${escaped(entry.name)}</b><br>${wrapped(entry.words)}<br>loss ${nats(middle[i])} over ${losses[i].length} seeds, ${short(entry.flops_per_token)} FLOPs/token`),
    marker: { symbol: mark[0], size: mark[1], color: colour(role), line: { color: colour("paper"), width: 1 } },
  }];
}

// Of equal FLOPs by construction: side by side, or their bars hide one another.
function before(i) {
  const own = R.entries[i].flops_per_token;
  return R.entries.slice(0, i).filter((entry) => Math.abs(entry.flops_per_token - own) < 0.01 * own).length;
}

function flopsAxis(data) {
  const all = data.flatMap((trace) => trace.x);
  const wide = Math.max(...all) > 8 * Math.min(...all);
  return { title: { text: axisName("flops") + ", full size" }, type: wide ? "log" : "linear", exponentformat: "SI", dtick: wide ? "D2" : undefined };
}

// What was stopped after a few steps stands far above; a double click shows it all.
function lossRange(stopped) {
  const shown = [...ranked.map(lossOf), ...R.entries.flatMap((entry) => finite(entry.objective))];
  if (!shown.length) return undefined;
  const low = Math.min(...shown), high = Math.max(...shown);
  const room = Math.max(high - low, 1e-3);
  const top = Math.max(high + 0.12 * room, Math.min(Math.max(high, ...stopped.map(lossOf)) + 0.05 * room, high + 0.8 * room));
  return [low - 0.12 * room, top];
}

const BANDS = 12;
function curvesPicture(task) {
  const shades = [[0, colour("best")], [1, colour("worst")]];
  const climbed = R.trials.filter((one) => one.outcome !== "reused" && one.rungs.some((rung) => rung[task]));
  const band = (one) => (rank.has(one.trial) ? Math.floor((BANDS * rank.get(one.trial)) / ranked.length) : -1);
  const data = [];
  for (let i = BANDS - 1; i >= 0; i--) data.unshift(lines(climbed.filter((one) => band(one) === i), task, mixed((i + 0.5) / BANDS), 1.2));
  data.unshift(lines(climbed.filter((one) => band(one) < 0), task, colour("faint"), 0.8));
  const dots = climbed.flatMap((one) => one.rungs.filter((rung) => rung[task] && known(rung[task].loss)).map((rung) => [one, rung[task]]));
  const at = (some, marker, name) => ({
    type: "scatter", mode: "markers", hoverinfo: "text", name, marker,
    x: some.map(([, score]) => score.steps), y: some.map(([, score]) => score.loss), customdata: some.map(([one]) => `trial-${one.trial}`),
    text: some.map(([one, score]) => `<b>trial ${one.trial}</b>${rank.has(one.trial) ? `, rank ${rank.get(one.trial) + 1}` : ", " + escaped(one.outcome)}<br>${wrapped(one.words)}<br>${escaped(task)} ${nats(score.loss)} after ${score.steps} steps`),
  });
  const grey = dots.filter(([one]) => !rank.has(one.trial)), ended = dots.filter(([one]) => rank.has(one.trial));
  data.push(at(grey, { color: colour("faint"), size: 6 }, "stopped"));
  data.push(at(ended, { color: ended.map(([one]) => rank.get(one.trial) + 1), colorscale: shades, cmin: 1, cmax: Math.max(2, ranked.length), size: 8, line: { color: colour("paper"), width: 1 }, showscale: true, colorbar: { title: { text: "final rank", side: "right" }, thickness: 12, outlinewidth: 0, tick0: 1, dtick: Math.ceil(ranked.length / 8) || 1 } }, "rungs"));
  const heights = [...dots.map(([, score]) => score.loss), ...climbed.flatMap((one) => beyond(last(one)[task]?.curve || []))];
  const low = Math.min(...heights), high = Math.max(...heights), room = 0.05 * (high - low || 1);
  return { data, layout: { showlegend: false, xaxis: { title: { text: "steps trained" }, rangemode: "tozero" }, yaxis: { title: { text: `${task}: loss, nats` }, range: [low - room, high + room] } } };
}

// The first steps fall so far that they would leave no room for the rest.
const beyond = (curve) => curve.slice(Math.floor(curve.length / 10)).map(([, loss]) => loss);

function lines(some, task, shade, width) {
  const curves = some.map((one) => last(one)[task]?.curve || []);
  return {
    type: "scatter", mode: "lines", hoverinfo: "skip", line: { color: shade, width }, connectgaps: false,
    x: curves.flatMap((curve) => [...curve.map(([step]) => step), null]), y: curves.flatMap((curve) => [...curve.map(([, loss]) => loss), null]),
  };
}

// Between the colours of the best and of the worst.
function mixed(share) {
  const parts = (text) => [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
  const low = parts(colour("best")), high = parts(colour("worst"));
  return `rgb(${low.map((part, i) => Math.round(part + (high[i] - part) * share)).join(",")})`;
}

function agreement(pairs, across, up) {
  const data = [{
    type: "scatter", mode: "markers", hoverinfo: "text", x: pairs.map(([, x]) => x), y: pairs.map(([, , y]) => y),
    customdata: pairs.map(([number]) => `trial-${number}`), marker: { color: colour("accent"), size: 9, opacity: 0.85 },
    text: pairs.map(([number, x, y]) => `<b>trial ${number}</b><br>${wrapped(trial.get(number)?.words || "")}<br>${nats(x)}, then ${nats(y)}`),
  }];
  return { data, layout: { showlegend: false, xaxis: { title: { text: across } }, yaxis: { title: { text: up } } } };
}

// Parallel coordinates in SVG: plotly's own need WebGL, which not every browser has.
const HEIGHT = 300, TOP = 52, LEFT = 60, RIGHT = 80, AXES_AT_MOST = 10;

function scale(name, read, some) {
  const values = some.map(read).filter((one) => one !== undefined);
  const numeric = values.every((one) => typeof one === "number");
  const distinct = [...new Set(values.map((one) => (numeric ? one : value(one))))].sort((a, b) => (numeric ? a - b : a < b ? -1 : 1));
  const low = distinct[0], high = distinct[distinct.length - 1];
  const height = (of) => {
    if (of === undefined) return TOP + HEIGHT + 16; // below the axis: not asked of this trial
    const share = numeric ? (of - low) / (high - low || 1) : distinct.indexOf(value(of)) / (distinct.length - 1 || 1);
    return TOP + HEIGHT * (1 - share);
  };
  return { name, read, height, ticks: distinct.length <= 7 ? distinct : [low, high], unused: values.length < some.length, said: numeric && high >= 1e4 ? short : (tick) => (numeric ? String(Math.round(tick * 1000) / 1000) : tick), kept: null };
}

// Of the trials that reached the last rung: losses of different rungs do not compare.
function parallel(room) {
  const some = ranked;
  const leaves = [...new Set(some.flatMap((one) => Object.keys(one.choices)))];
  const varied = leaves.filter((leaf) => new Set(some.map((one) => value(one.choices[leaf] ?? null))).size > 1)
    .sort((a, b) => (R.importance[b] || 0) - (R.importance[a] || 0)).slice(0, AXES_AT_MOST);
  const scales = [...varied.map((leaf) => scale(leaf, (one) => one.choices[leaf], some)), scale("FLOPs/token", flopsOf, some), scale("loss", lossOf, some)];
  const step = Math.max(92, (room - LEFT - RIGHT) / (scales.length - 1));
  const at = (i) => LEFT + i * step;
  const order = [...some].reverse().sort((a, b) => (a.trial === R.winner) - (b.trial === R.winner));
  const paths = order.map((one) => {
    const place = rank.get(one.trial);
    const path = svg("path", {
      d: "M" + scales.map((axis, i) => `${at(i)} ${axis.height(axis.read(one)).toFixed(1)}`).join("L"),
      class: one.trial === R.winner ? "won" : null, onclick: () => { location.hash = `trial-${one.trial}`; },
    }, svg("title", {}, `trial ${one.trial}: ${one.words}, loss ${nats(lossOf(one))}`));
    path.style.opacity = one.trial === R.winner ? 1 : Math.max(0.2, Math.min(0.6, 30 / ranked.length));
    path.style.stroke = one.trial === R.winner ? "var(--winner)" : `color-mix(in srgb, var(--worst) ${Math.round((100 * place) / ranked.length)}%, var(--best))`;
    return path;
  });
  const keep = () => order.forEach((one, i) => {
    const stays = scales.every((axis) => !axis.kept || (axis.height(axis.read(one)) >= axis.kept[0] && axis.height(axis.read(one)) <= axis.kept[1]));
    paths[i].classList.toggle("out", !stays);
  });
  const width = at(scales.length - 1) + RIGHT;
  return svg("svg", { viewBox: `0 0 ${width} ${TOP + HEIGHT + 34}`, width, height: TOP + HEIGHT + 34, role: "img", "aria-label": "Parallel coordinates of the choices, FLOPs and loss of each trial" },
    svg("g", {}, paths), scales.map((axis, i) => axisOf(axis, at(i), keep)));
}

function axisOf(axis, x, keep) {
  const parts = axis.name.split("."), named = parts.findLastIndex((part) => !/^\d+$/.test(part));
  const tail = parts.splice(Math.max(0, named)).join(".");
  const brush = svg("rect", { class: "brush", x: x - 9, width: 18, height: 0, y: TOP });
  const grip = svg("rect", { class: "grip", x: x - 14, y: TOP - 8, width: 28, height: HEIGHT + 32 });
  let from = null;
  const place = (event) => {
    const box = grip.getBoundingClientRect();
    return TOP - 8 + ((event.clientY - box.top) / box.height) * (HEIGHT + 32);
  };
  grip.addEventListener("pointerdown", (event) => { from = place(event); grip.setPointerCapture(event.pointerId); });
  grip.addEventListener("pointermove", (event) => { if (from !== null) span(from, place(event)); });
  grip.addEventListener("pointerup", (event) => { span(from, place(event)); from = null; });
  function span(a, b) {
    axis.kept = Math.abs(a - b) < 4 ? null : [Math.min(a, b), Math.max(a, b)];
    brush.setAttribute("y", axis.kept ? axis.kept[0] : TOP);
    brush.setAttribute("height", axis.kept ? axis.kept[1] - axis.kept[0] : 0);
    keep();
  }
  return svg("g", {}, svg("line", { class: "axis", x1: x, x2: x, y1: TOP, y2: TOP + HEIGHT }), brush,
    svg("text", { x, y: 14, "text-anchor": "middle" }, cut(parts.slice(-2).join("."))), svg("text", { x, y: 30, "text-anchor": "middle", class: "name" }, cut(tail)),
    axis.ticks.map((tick) => svg("text", { x: x + 5, y: axis.height(tick) + 4 }, cut(axis.said(tick)))), axis.unused ? svg("text", { x: x + 5, y: TOP + HEIGHT + 30 }, "unused") : null, grip, svg("title", {}, axis.name));
}
const cut = (text, length = 14) => (text.length > length ? "…" + text.slice(1 - length) : text);
