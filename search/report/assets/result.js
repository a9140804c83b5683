// The results: key figures, front, baselines, learning curves, choices, routers.
"use strict";

function showFigures() {
  const own = winner || trial.get(R.winner);
  if (!own) return;
  const losses = winner ? finite(winner.objective) : [lossOf(own)];
  const trained =
    Object.values(R.spent.outcomes).reduce((sum, n) => sum + n, 0) -
    ["reused", "infeasible", "invalid"].reduce((sum, name) => sum + (R.spent.outcomes[name] || 0), 0);
  const kv = trial.get(R.winner)?.kv_bytes_per_token;
  const shown = [
    ["Winner", el("a", { href: `#trial-${R.winner}` }, `trial ${R.winner}`), own.words],
    [
      "Loss of the winner",
      losses.length ? nats(mean(losses)) : "diverged",
      (losses.length > 1
        ? `nats; ${nats(Math.min(...losses))} to ${nats(Math.max(...losses))} over ${losses.length} seeds`
        : "nats; one seed: no interval") + bitsOfTexts(own),
    ],
    ["Parameters", parameters(own.params), allowed("params") || own.params.toLocaleString("en")],
    [
      "FLOPs per token",
      short(own.flops_per_token),
      `nominal ${allowed("flops")}`.trim() + (known(executedOf(own)) ? `; ${short(executedOf(own))} executed` : ""),
    ],
    ["KV cache", known(kv) ? `${short(kv)}B` : "–", allowed("kv", "B per token") || "per token"],
    ["Trials trained", String(trained), `of ${R.trials.length} trials; ${R.front.length} on the front`],
    ["Spending", duration(R.spent.wall_seconds), `${flops(R.spent.train_flops)} training FLOPs`],
  ];
  $("figures").append(
    ...shown.map(([name, figure, more]) =>
      el("div", {}, el("dt", {}, name), el("dd", {}, el("b", {}, figure), el("small", {}, more))),
    ),
  );
  if (R.interrupted)
    $("figures").before(el("p", { class: "note" }, "The search was interrupted. Run the same command again to continue it."));
}

const allowed = (limit, unit = "") => (known(R.budget?.[limit]) ? `of ${short(R.budget[limit])}${unit} allowed` : "");

function bitsOfTexts(own) {
  const scores = (task) => (winner ? own.scores[task] || [] : [last(own)?.[task]]);
  const bits = TASKS.map((task) => [task, finite(scores(task).map((score) => score?.bits_per_byte))]);
  return bits.map(([task, found]) => (found.length ? `; ${task}: ${bitsPerByte(mean(found))}` : "")).join("");
}

function showFront() {
  plot($("plot-front"), frontPicture);
  const unscored = R.trials.filter((one) => !known(lossOf(one)) && one.outcome !== "reused").length;
  const reused = R.trials.filter((one) => one.outcome === "reused").length;
  const said = [`Proxies: ${R.proxy}.`];
  if (unscored) said.push(`Trials without a score, which only the table shows: ${unscored}.`);
  if (MEASURED && R.entries.some((entry) => finite(entry.objective).length && !known(executedOf(entry))))
    said.push("Models whose executed FLOPs were not measured stand at their nominal FLOPs.");
  if (reused) said.push(`Trials that repeated an earlier model and were not trained again: ${reused}.`);
  $("front-note").textContent = said.join(" ");
}

// baselines

function showBaselines() {
  if (!R.entries.length)
    return absent(
      "baselines",
      "The winner has not been compared with its baselines yet. Run the same command again to continue.",
    );
  const gaps = R.entries.map((entry) => entry.difference?.objective).filter((gap) => gap && known(gap.mean));
  const ends = gaps.flatMap((gap) => [gap.mean - (gap.half_width || 0), gap.mean + (gap.half_width || 0)]);
  const low = Math.min(0, ...ends),
    high = Math.max(0, ...ends);
  const head = [
    "",
    el("th", { class: "left", scope: "col" }, "above the winner"),
    "loss",
    ...TASKS,
    "nominal FLOPs/token",
    "parameters",
  ];
  const rows = R.entries.map((entry, i) => [
    el(
      "td",
      { class: "long" },
      el("a", { href: `#entry-${i}` }, entry.name),
      " ",
      el("span", { class: `tag ${entry.role}` }, entry.role),
      el("small", {}, entry.words),
    ),
    gapCell(entry, low, high),
    over(finite(entry.objective), entry.objective.length),
    ...TASKS.map((task) => overTask(entry.scores[task] || [])),
    [
      short(entry.flops_per_token),
      known(executedOf(entry)) ? el("small", {}, `${short(executedOf(entry))} executed`) : null,
    ],
    parameters(entry.params),
  ]);
  $("baselines-table").append(table(head, rows));
}

function over(losses, seeds) {
  if (!losses.length) return "–";
  const wide = losses.length > 1 ? `${nats(Math.min(...losses))}–${nats(Math.max(...losses))}` : "one seed";
  return [
    nats(mean(losses)),
    el("small", {}, losses.length < seeds ? `${seeds - losses.length} of ${seeds} diverged` : wide),
  ];
}
function overTask(scores) {
  const losses = finite(scores.map((score) => score.loss)),
    hits = finite(scores.map((score) => score.accuracy)),
    bits = finite(scores.map((score) => score.bits_per_byte));
  if (!losses.length) return "–";
  return [
    nats(mean(losses)),
    bits.length ? el("small", {}, `${mean(bits).toFixed(3)} bits/byte`) : null,
    hits.length ? el("small", {}, percent(mean(hits)) + " accuracy") : null,
  ];
}

function gapCell(entry, low, high) {
  if (entry.error) return el("td", { class: "left warn" }, entry.error);
  const gap = entry.difference?.objective;
  if (!gap) return el("td", { class: "left" }, "–");
  if (!known(gap.mean)) return el("td", { class: "left" }, "diverged");
  const half = gap.half_width;
  const sure = known(half) && Math.abs(gap.mean) > half;
  const conclusion = !known(half)
    ? "one seed"
    : sure
      ? gap.mean > 0
        ? "winner is better"
        : "winner is worse"
      : "no clear difference";
  const tone = colourOf(sure ? (gap.mean > 0 ? "accent" : "winner") : "soft");
  const x = (at) => 6 + (188 * (at - low)) / (high - low || 1);
  const picture = svg(
    "svg",
    { class: "interval", viewBox: "0 0 200 24", "aria-hidden": "true" },
    svg("line", { x1: x(0), x2: x(0), y1: 1, y2: 23, stroke: "var(--faint)" }),
    svg("line", {
      x1: x(gap.mean - (half || 0)),
      x2: x(gap.mean + (half || 0)),
      y1: 12,
      y2: 12,
      stroke: tone,
      "stroke-width": 3,
    }),
    svg("circle", { cx: x(gap.mean), cy: 12, r: 5, fill: tone }),
  );
  return el(
    "td",
    { class: "left" },
    picture,
    ` ${signed(gap.mean)}${known(half) ? " ± " + half.toFixed(3) : ""}`,
    el("small", {}, conclusion),
  );
}
const colourOf = (name) => `var(--${name})`;

// curves, choices, routers

function showCurves() {
  if (!R.trials.some((one) => one.rungs.length)) return absent("curves", "No trial was trained.");
  let task = TASKS[0];
  plot($("plot-curves"), () => curvesPicture(task));
  $("curves-tools").append(
    switcher("Task", TASKS, (name) => {
      task = name;
      if (window.Plotly) draw($("plot-curves"));
    }),
  );
}

function showChoices() {
  const found = Object.entries(R.importance).sort((a, b) => b[1] - a[1]);
  const most = found.length ? found[0][1] : 1;
  $("importance-bars").append(...found.map(([leaf, share]) => bar(el("code", {}, leaf), share / most, percent(share))));
  if (!found.length)
    $("importance-bars").append(el("p", { class: "soft" }, "Too few trials reached the last rung to estimate this."));
  if (R.noise?.share >= 0.5) $("importance-bars").before(el("p", { class: "note" }, R.noise.sentence));
  if (ranked.length) $("parallel").append(parallel($("parallel").clientWidth));
}

function showRouters() {
  const models = [
    ...R.entries.map((entry) => [entry.name, entry.scores]),
    ...ranked.map((one) => [`trial ${one.trial}`, Object.fromEntries(TASKS.map((task) => [task, [last(one)[task]]]))]),
  ].filter(([, scores]) =>
    TASKS.some((task) => (scores[task] || []).some((score) => score && Object.keys(score.shares || {}).length)),
  );
  if (!models.length) return absent("routers", "No model here has a router.");
  let chosen = 0,
    task = TASKS[0];
  const show = () => {
    const scores = (models[chosen][1][task] || []).filter(Boolean);
    const shares = averaged(scores.map((score) => score.shares || {})),
      bits = averaged(scores.map((score) => score.entropies || {}));
    $("routers-maps").replaceChildren(
      heat("Share of tokens selected", shares, percent, (share) => share < 0.01 || share > 0.99),
      heat(
        "Entropy of the selection, bits",
        bits,
        (bit) => bit.toFixed(2),
        () => false,
      ),
    );
  };
  const pick = el(
    "select",
    {
      onchange: (event) => {
        chosen = Number(event.target.value);
        show();
      },
    },
    models.map(([name], i) => el("option", { value: i }, name)),
  );
  $("routers-tools").append(
    el("label", {}, "Model ", pick),
    switcher("Task", TASKS, (name) => {
      task = name;
      show();
    }),
  );
  show();
}

function averaged(maps) {
  const names = [...new Set(maps.flatMap(Object.keys))];
  return new Map(names.map((name) => [name, mean(maps.map((map) => map[name]).filter(known))]));
}

// "blocks.0.blocks.1.2" is the third routed step of the loop blocks.0.blocks.1
function heat(title, map, said, odd) {
  if (!map.size)
    return el(
      "figure",
      { class: "heat", style: "margin:0" },
      el("figcaption", { class: "soft" }, `${title}: not recorded`),
    );
  const loops = new Map();
  for (const [name, share] of map) {
    const dot = name.lastIndexOf(".");
    if (!loops.has(name.slice(0, dot))) loops.set(name.slice(0, dot), new Map());
    loops.get(name.slice(0, dot)).set(Number(name.slice(dot + 1)), share);
  }
  const steps = [...new Set([...loops.values()].flatMap((byStep) => [...byStep.keys()]))].sort((a, b) => a - b);
  const rows = [...loops].map(([loop, byStep]) => [
    el("th", { scope: "row" }, el("code", {}, loop)),
    ...steps.map((step) => {
      const share = byStep.get(step);
      if (!known(share)) return el("td", {}, "");
      const cell = el("td", { class: odd(share) ? "odd" : null }, said(share));
      cell.style.background = `color-mix(in srgb, var(--accent) ${Math.round(62 * Math.min(1, share))}%, var(--raised))`;
      return cell;
    }),
  ]);
  return el(
    "figure",
    { class: "heat scroll", style: "margin:0" },
    el("figcaption", { class: "soft" }, title),
    table(["loop", ...steps.map((step) => `routed step ${step + 1}`)], rows),
  );
}
