// Parallel coordinates, drawn as SVG: those of plotly need WebGL, which not every browser has.
"use strict";

const HEIGHT = 300,
  TOP = 52,
  LEFT = 60,
  RIGHT = 80,
  AXES_AT_MOST = 10;

function scale(name, read, some) {
  const values = some.map(read).filter((one) => one !== undefined);
  const numeric = values.every((one) => typeof one === "number");
  const distinct = [...new Set(values.map((one) => (numeric ? one : value(one))))].sort((a, b) =>
    numeric ? a - b : a < b ? -1 : 1,
  );
  const low = distinct[0],
    high = distinct[distinct.length - 1];
  const height = (of) => {
    if (of === undefined) return TOP + HEIGHT + 16; // below the axis: this trial has no such choice
    const share = numeric ? (of - low) / (high - low || 1) : distinct.indexOf(value(of)) / (distinct.length - 1 || 1);
    return TOP + HEIGHT * (1 - share);
  };
  return {
    name,
    read,
    height,
    ticks: distinct.length <= 7 ? distinct : [low, high],
    unused: values.length < some.length,
    said: numeric && high >= 1e4 ? short : (tick) => (numeric ? String(Math.round(tick * 1000) / 1000) : tick),
    kept: null,
  };
}

// Shows only trials that reached the last rung: losses of different rungs are not comparable.
function parallel(room) {
  const some = ranked;
  const leaves = [...new Set(some.flatMap((one) => Object.keys(one.choices)))];
  const varied = leaves
    .filter((leaf) => new Set(some.map((one) => value(one.choices[leaf] ?? null))).size > 1)
    .sort((a, b) => (R.importance[b] || 0) - (R.importance[a] || 0))
    .slice(0, AXES_AT_MOST);
  const scales = [
    ...varied.map((leaf) => scale(leaf, (one) => one.choices[leaf], some)),
    scale(`${WHICH} FLOPs/token`, flopsOf, some),
    scale("loss", lossOf, some),
  ];
  const step = Math.max(92, (room - LEFT - RIGHT) / (scales.length - 1));
  const at = (i) => LEFT + i * step;
  const order = [...some].reverse().sort((a, b) => (a.trial === R.winner) - (b.trial === R.winner));
  const paths = order.map((one) => {
    const place = rank.get(one.trial);
    const path = svg(
      "path",
      {
        d: "M" + scales.map((axis, i) => `${at(i)} ${axis.height(axis.read(one)).toFixed(1)}`).join("L"),
        class: one.trial === R.winner ? "won" : null,
        onclick: () => {
          location.hash = `trial-${one.trial}`;
        },
      },
      svg("title", {}, `trial ${one.trial}: ${one.words}, loss ${nats(lossOf(one))}`),
    );
    path.style.opacity = one.trial === R.winner ? 1 : Math.max(0.2, Math.min(0.6, 30 / ranked.length));
    path.style.stroke =
      one.trial === R.winner
        ? "var(--winner)"
        : `color-mix(in srgb, var(--worst) ${Math.round((100 * place) / ranked.length)}%, var(--best))`;
    return path;
  });
  const keep = () =>
    order.forEach((one, i) => {
      const stays = scales.every(
        (axis) =>
          !axis.kept || (axis.height(axis.read(one)) >= axis.kept[0] && axis.height(axis.read(one)) <= axis.kept[1]),
      );
      paths[i].classList.toggle("out", !stays);
    });
  const width = at(scales.length - 1) + RIGHT;
  return svg(
    "svg",
    {
      viewBox: `0 0 ${width} ${TOP + HEIGHT + 34}`,
      width,
      height: TOP + HEIGHT + 34,
      role: "img",
      "aria-label": "Parallel coordinates of the choices, FLOPs and loss of each trial",
    },
    svg("g", {}, paths),
    scales.map((axis, i) => axisOf(axis, at(i), keep)),
  );
}

function axisOf(axis, x, keep) {
  const parts = axis.name.split("."),
    named = parts.findLastIndex((part) => !/^\d+$/.test(part));
  const tail = parts.splice(Math.max(0, named)).join(".");
  const brush = svg("rect", { class: "brush", x: x - 9, width: 18, height: 0, y: TOP });
  const grip = svg("rect", { class: "grip", x: x - 14, y: TOP - 8, width: 28, height: HEIGHT + 32 });
  let from = null;
  const place = (event) => {
    const box = grip.getBoundingClientRect();
    return TOP - 8 + ((event.clientY - box.top) / box.height) * (HEIGHT + 32);
  };
  grip.addEventListener("pointerdown", (event) => {
    from = place(event);
    grip.setPointerCapture(event.pointerId);
  });
  grip.addEventListener("pointermove", (event) => {
    if (from !== null) span(from, place(event));
  });
  grip.addEventListener("pointerup", (event) => {
    span(from, place(event));
    from = null;
  });
  function span(a, b) {
    axis.kept = Math.abs(a - b) < 4 ? null : [Math.min(a, b), Math.max(a, b)];
    brush.setAttribute("y", axis.kept ? axis.kept[0] : TOP);
    brush.setAttribute("height", axis.kept ? axis.kept[1] - axis.kept[0] : 0);
    keep();
  }
  return svg(
    "g",
    {},
    svg("line", { class: "axis", x1: x, x2: x, y1: TOP, y2: TOP + HEIGHT }),
    brush,
    svg("text", { x, y: 14, "text-anchor": "middle" }, cut(parts.slice(-2).join("."))),
    svg("text", { x, y: 30, "text-anchor": "middle", class: "name" }, cut(tail)),
    axis.ticks.map((tick) => svg("text", { x: x + 5, y: axis.height(tick) + 4 }, cut(axis.said(tick)))),
    axis.unused ? svg("text", { x: x + 5, y: TOP + HEIGHT + 30 }, "unused") : null,
    grip,
    svg("title", {}, axis.name),
  );
}
const cut = (text, length = 14) => (text.length > length ? "…" + text.slice(1 - length) : text);
