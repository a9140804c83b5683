// The sections of the report, and the panel that shows one spec.
"use strict";

function showFigures() {
  const own = winner || trial.get(R.winner);
  if (!own) return;
  const losses = winner ? finite(winner.objective) : [lossOf(own)];
  const trained = Object.values(R.spent.outcomes).reduce((sum, n) => sum + n, 0) - ["reused", "infeasible", "invalid"].reduce((sum, name) => sum + (R.spent.outcomes[name] || 0), 0);
  const kv = trial.get(R.winner)?.kv_bytes_per_token;
  const shown = [
    ["Winner", el("a", { href: `#trial-${R.winner}` }, `trial ${R.winner}`), own.words],
    ["Loss of the winner", losses.length ? nats(mean(losses)) : "diverged", losses.length > 1 ? `nats; ${nats(Math.min(...losses))} to ${nats(Math.max(...losses))} over ${losses.length} seeds` : "nats, one seed"],
    ["Parameters", parameters(own.params), `${own.params.toLocaleString("en")}`],
    ["FLOPs per token", short(own.flops_per_token), "forward, full size"],
    ["KV cache", known(kv) ? `${short(kv)}B` : "–", "per token"],
    ["Trials trained", String(trained), `of ${R.trials.length} draws; ${R.front.length} on the front`],
    ["Spent", duration(R.spent.wall_seconds), `${flops(R.spent.train_flops)} training FLOPs`],
  ];
  $("figures").append(...shown.map(([name, figure, more]) => el("div", {}, el("dt", {}, name), el("dd", {}, el("b", {}, figure), el("small", {}, more)))));
  if (R.interrupted) $("figures").before(el("p", { class: "note" }, "The search was interrupted; the same command goes on with it."));
}

function showFront() {
  plot($("plot-front"), frontPicture);
  const absentee = R.trials.filter((one) => !known(lossOf(one)) && one.outcome !== "reused").length;
  const reused = R.trials.filter((one) => one.outcome === "reused").length;
  const said = [`Trained as proxies: ${R.proxy}.`];
  if (absentee) said.push(`${absentee} draws have no score and are only in the table.`);
  if (reused) said.push(`${reused} draws were models already known.`);
  $("front-note").textContent = said.join(" ");
}

// controls

function showControls() {
  if (!R.entries.length) return absent("controls", "The winner has not met its controls yet; the same command goes on with it.");
  const gaps = R.entries.map((entry) => entry.difference?.objective).filter((gap) => gap && known(gap.mean));
  const ends = gaps.flatMap((gap) => [gap.mean - (gap.half_width || 0), gap.mean + (gap.half_width || 0)]);
  const low = Math.min(0, ...ends), high = Math.max(0, ...ends);
  const head = ["", el("th", { class: "left", scope: "col" }, "above the winner"), "loss", ...TASKS, "FLOPs/token", "parameters"];
  const rows = R.entries.map((entry, i) => [
    el("td", { class: "long" }, el("a", { href: `#entry-${i}` }, entry.name), " ", el("span", { class: `tag ${entry.role}` }, entry.role), el("small", {}, entry.words)),
    gapCell(entry, low, high), over(finite(entry.objective), entry.objective.length),
    ...TASKS.map((task) => overTask(entry.scores[task] || [])), short(entry.flops_per_token), parameters(entry.params),
  ]);
  $("controls-table").append(table(head, rows));
}

function over(losses, seeds) {
  if (!losses.length) return "–";
  const wide = losses.length > 1 ? `${nats(Math.min(...losses))}–${nats(Math.max(...losses))}` : "one seed";
  return [nats(mean(losses)), el("small", {}, losses.length < seeds ? `${seeds - losses.length} of ${seeds} diverged` : wide)];
}
function overTask(scores) {
  const losses = finite(scores.map((score) => score.loss)), hits = finite(scores.map((score) => score.accuracy));
  if (!losses.length) return "–";
  return [nats(mean(losses)), hits.length ? el("small", {}, percent(mean(hits)) + " right") : null];
}

function gapCell(entry, low, high) {
  if (entry.error) return el("td", { class: "left warn" }, entry.error);
  const gap = entry.difference?.objective;
  if (!gap) return el("td", { class: "left" }, "–");
  if (!known(gap.mean)) return el("td", { class: "left" }, "diverged");
  const half = gap.half_width;
  const sure = known(half) && Math.abs(gap.mean) > half;
  const verdict = !known(half) ? "one seed" : sure ? (gap.mean > 0 ? "winner is better" : "winner is worse") : "cannot tell";
  const tone = colourOf(sure ? (gap.mean > 0 ? "accent" : "winner") : "soft");
  const x = (at) => 6 + (188 * (at - low)) / (high - low || 1);
  const picture = svg("svg", { class: "interval", viewBox: "0 0 200 24", "aria-hidden": "true" },
    svg("line", { x1: x(0), x2: x(0), y1: 1, y2: 23, stroke: "var(--faint)" }),
    svg("line", { x1: x(gap.mean - (half || 0)), x2: x(gap.mean + (half || 0)), y1: 12, y2: 12, stroke: tone, "stroke-width": 3 }),
    svg("circle", { cx: x(gap.mean), cy: 12, r: 5, fill: tone }));
  return el("td", { class: "left" }, picture, ` ${signed(gap.mean)}${known(half) ? " ± " + half.toFixed(3) : ""}`, el("small", {}, verdict));
}
const colourOf = (name) => `var(--${name})`;

// curves, choices, routers

function showCurves() {
  if (!R.trials.some((one) => one.rungs.length)) return absent("curves", "No trial was trained.");
  let task = TASKS[0];
  plot($("plot-curves"), () => curvesPicture(task));
  $("curves-tools").append(switcher("Task", TASKS, (name) => {
    task = name;
    if (window.Plotly) draw($("plot-curves"));
  }));
}

function showChoices() {
  const found = Object.entries(R.importance).sort((a, b) => b[1] - a[1]);
  const most = found.length ? found[0][1] : 1;
  $("importance-bars").append(...found.map(([leaf, share]) => bar(el("code", {}, leaf), share / most, percent(share))));
  if (!found.length) $("importance-bars").append(el("p", { class: "soft" }, "Too few trials reached the last rung to say."));
  if (ranked.length) $("parallel").append(parallel($("parallel").clientWidth));
}

function showRouters() {
  const models = [...R.entries.map((entry) => [entry.name, entry.scores]), ...ranked.map((one) => [`trial ${one.trial}`, Object.fromEntries(TASKS.map((task) => [task, [last(one)[task]]]))])]
    .filter(([, scores]) => TASKS.some((task) => (scores[task] || []).some((score) => score && Object.keys(score.shares || {}).length)));
  if (!models.length) return absent("routers", "No model here has a router.");
  let chosen = 0, task = TASKS[0];
  const show = () => {
    const scores = (models[chosen][1][task] || []).filter(Boolean);
    const shares = averaged(scores.map((score) => score.shares || {})), bits = averaged(scores.map((score) => score.entropies || {}));
    $("routers-maps").replaceChildren(heat("Share selected", shares, percent, (share) => share < 0.01 || share > 0.99), heat("Entropy, bits", bits, (bit) => bit.toFixed(2), () => false));
  };
  const pick = el("select", { onchange: (event) => { chosen = Number(event.target.value); show(); } }, models.map(([name], i) => el("option", { value: i }, name)));
  $("routers-tools").append(el("label", {}, "Model ", pick), switcher("Task", TASKS, (name) => { task = name; show(); }));
  show();
}

function averaged(maps) {
  const names = [...new Set(maps.flatMap(Object.keys))];
  return new Map(names.map((name) => [name, mean(maps.map((map) => map[name]).filter(known))]));
}

// "blocks.0.blocks.1.2" is the third routed step of the loop blocks.0.blocks.1
function heat(title, map, said, odd) {
  if (!map.size) return el("figure", { class: "heat", style: "margin:0" }, el("figcaption", { class: "soft" }, `${title}: not recorded`));
  const loops = new Map();
  for (const [name, share] of map) {
    const dot = name.lastIndexOf(".");
    if (!loops.has(name.slice(0, dot))) loops.set(name.slice(0, dot), new Map());
    loops.get(name.slice(0, dot)).set(Number(name.slice(dot + 1)), share);
  }
  const steps = [...new Set([...loops.values()].flatMap((byStep) => [...byStep.keys()]))].sort((a, b) => a - b);
  const rows = [...loops].map(([loop, byStep]) => [el("th", { scope: "row" }, el("code", {}, loop)), ...steps.map((step) => {
    const share = byStep.get(step);
    if (!known(share)) return el("td", {}, "");
    const cell = el("td", { class: odd(share) ? "odd" : null }, said(share));
    cell.style.background = `color-mix(in srgb, var(--accent) ${Math.round(62 * Math.min(1, share))}%, var(--raised))`;
    return cell;
  })]);
  return el("figure", { class: "heat scroll", style: "margin:0" }, el("figcaption", { class: "soft" }, title), table(["loop", ...steps.map((step) => `routed step ${step + 1}`)], rows));
}

// winner, trust, spent

function showWinner() {
  const own = winner || trial.get(R.winner);
  if (!own) return absent("winner", "No trial reached the last rung.");
  $("winner-words").append(`${own.words}. `, el("a", { href: `#trial-${R.winner}` }, "Its spec"));
  const most = Math.max(...R.tree.slice(1).map((row) => row.share), 1e-9);
  const rows = R.tree.map((row) => {
    const inside = el("span", { class: "fill" });
    inside.style.width = `${Math.min(100, (100 * row.share) / most)}%`;
    return [row.node, row.params.toLocaleString("en"), short(row.flops), percent(row.share), el("span", { class: "track" }, inside)];
  });
  $("winner-tree").append(table(["", "parameters", "FLOPs/token", "share", ""], rows, { class: "tree" }));
}

function tauWords(found) {
  if (!found || !known(found.tau)) return `too few pairs (${found ? found.pairs : 0}) to say`;
  const interval = known(found.low) ? ` (95%: ${found.low.toFixed(2)} to ${found.high.toFixed(2)})` : "";
  return `tau ${found.tau.toFixed(2)}${interval} over ${found.pairs} trials`;
}

function showTrust() {
  const own = R.trust, shared = R.shared;
  const climbed = ranked.filter((one) => one.rungs.length > 1 && known(objective(one.rungs[0]))).map((one) => [one.trial, objective(one.rungs[0]), lossOf(one)]);
  const shown = [];
  if (climbed.length) shown.push(["First rung and last rung", own && tauWords(own.between_rungs), climbed, "loss at the first rung", "loss at the last rung"]);
  if (own && own.points.length) shown.push([`The proxy and one of width ${own.width}`, tauWords(own.wider), own.points.map((p) => [p.number, p.loss, p.wider_loss]).filter(pairKnown), "loss of the proxy", `loss at width ${own.width}`]);
  if (shared) shown.push(["Shared weights and training alone", `${tauWords(shared.correlation)}; one training of ${flops(shared.shared_flops)} FLOPs for ${shared.settings} models, ${flops(shared.alone_flops)} for these ${shared.points.length} alone`, shared.points.map((p) => [p.trial, p.shared, p.alone]).filter(pairKnown), "loss with shared weights", "loss trained alone"]);
  if (!shown.length) return absent("trust", "Not measured: no trial climbed more than one rung.");
  for (const [title, said, pairs, across, up] of shown) {
    const node = el("div", { class: "plot square" });
    $("trust-plots").append(el("div", {}, el("h3", {}, title), el("p", { class: "soft" }, said), node));
    plot(node, () => agreement(pairs, across, up));
  }
}
const pairKnown = ([, x, y]) => known(x) && known(y);

function showSpent() {
  const spent = R.spent, used = { seconds: spent.wall_seconds, time: spent.wall_seconds, train_flops: spent.train_flops, trials: R.trials.length };
  const say = { seconds: duration, time: duration, train_flops: (n) => flops(n) + " FLOPs", trials: String };
  const target = $("spent-bars");
  const phases = Object.entries(spent.by_phase), sum = (key) => phases.reduce((total, [, phase]) => total + phase[key], 0) || 1;
  target.append(facts([["wall time", duration(spent.wall_seconds)], ["time of all workers", duration(spent.worker_seconds)], ["training", flops(spent.train_flops) + " FLOPs"], ["scoring", flops(spent.eval_flops) + " FLOPs"]]));
  const limits = Object.entries(spent.limits).filter(([name, limit]) => known(limit) && known(used[name]));
  if (limits.length) target.append(el("h3", {}, "Of what was allowed"), ...limits.map(([name, limit]) => bar(name === "seconds" ? "time" : words(name), used[name] / limit, `${say[name](used[name])} of ${say[name](limit)}`, used[name] > limit)));
  const phased = (title, key, say) => el("div", {}, el("h3", {}, title), ...phases.map(([name, phase]) => bar(words(name), phase[key] / sum(key), `${say(phase[key])}, ${percent(phase[key] / sum(key))}`)));
  target.append(el("div", { class: "pair" }, phased("Time of the workers, by phase", "seconds", duration), phased("Training FLOPs, by phase", "train_flops", flops)));
  const outcomes = Object.entries(spent.outcomes).sort((a, b) => b[1] - a[1]), draws = outcomes.reduce((total, [, n]) => total + n, 0) || 1;
  target.append(el("h3", {}, "How the draws ended"), ...outcomes.map(([name, n]) => bar(words(name), n / draws, `${n}, ${percent(n / draws)}`)));
}

// trials

const COLUMNS = [
  ["trial", (one) => one.trial], ["outcome", (one) => one.outcome], ["loss", lossOf], ["FLOPs/token", flopsOf],
  ...R.axes.filter((axis) => !["loss", "flops", "params", "kv"].includes(axis)).map((axis) => [words(axis), (one) => one.values?.[axis]]),
  ["parameters", (one) => one.params], ["KV/token", (one) => one.kv_bytes_per_token],
  ...(TASKS.length > 1 ? TASKS.map((task) => [task, (one) => last(one)?.[task]?.loss]) : []), ["model", (one) => one.words],
];
const SAID = { loss: nats, "FLOPs/token": short, parameters, "KV/token": (n) => short(n) + "B" };

function trialRow(one) {
  const cells = COLUMNS.map(([name, read]) => {
    const found = read(one);
    if (name === "trial") return el("td", {}, el("a", { href: `#trial-${one.trial}` }, String(one.trial)));
    if (name === "outcome") return el("td", { class: "left" }, `${one.outcome} `, one.trial === R.winner ? el("span", { class: "tag winner" }, "winner") : front.has(one.trial) ? el("span", { class: "tag front" }, "front") : null);
    if (name === "model") return el("td", { class: "left long" }, one.words, one.error ? el("small", {}, one.error) : null);
    return el("td", {}, known(found) ? (SAID[name] || (TASKS.includes(name) ? nats : short))(found) : "–");
  });
  return el("tr", { class: rank.has(one.trial) ? null : "quiet", "data-trial": one.trial, onclick: (event) => { if (!event.target.closest("a")) location.hash = `trial-${one.trial}`; } }, cells);
}

function showTrials() {
  const rows = new Map(R.trials.map((one) => [one.trial, trialRow(one)]));
  const head = COLUMNS.map(([name], i) => el("th", { scope: "col", class: ["outcome", "model"].includes(name) ? "left" : null, "aria-sort": i ? null : "ascending" }, el("button", { type: "button", onclick: () => sort(i) }, name)));
  const body = table(head, [...rows.values()]);
  $("trials-table").append(body);
  function sort(i) {
    const down = head[i].getAttribute("aria-sort") === "ascending";
    head.forEach((cell, j) => (j === i ? cell.setAttribute("aria-sort", down ? "descending" : "ascending") : cell.removeAttribute("aria-sort")));
    const read = COLUMNS[i][1];
    const order = [...R.trials].sort((a, b) => compare(read(a), read(b), down) || a.trial - b.trial);
    body.tBodies[0].append(...order.map((one) => rows.get(one.trial)));
  }
  const texts = new Map(R.trials.map((one) => [one.trial, [one.trial, one.outcome, one.words, one.error, one.fingerprint, ...Object.entries(one.choices).map(([leaf, of]) => `${leaf}=${value(of)}`)].join(" ").toLowerCase()]));
  const filter = () => {
    const sought = $("find").value.trim().toLowerCase().split(/\s+/), outcome = $("outcome").value;
    let count = 0;
    for (const one of R.trials) {
      const stays = (!outcome || one.outcome === outcome) && sought.every((word) => texts.get(one.trial).includes(word));
      rows.get(one.trial).hidden = !stays;
      count += stays;
    }
    $("found").textContent = `${count} of ${R.trials.length}`;
  };
  $("outcome").append(el("option", { value: "" }, "any"), ...[...new Set(R.trials.map((one) => one.outcome))].sort().map((name) => el("option", { value: name }, name)));
  $("find").addEventListener("input", filter);
  $("outcome").addEventListener("change", filter);
  filter();
}

// What has no value stands last, whichever way.
function compare(a, b, down) {
  if (!known(a) || !known(b)) return known(b) - known(a);
  return (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1);
}

function showAgain() {
  $("command").textContent = R.command || "";
  const { space, ...settings } = R.settings;
  const list = (title, data) => el("div", {}, el("h3", {}, title), facts(flat(data)));
  $("settings").append(list("Settings", settings), list("Versions", R.versions));
  if (space) $("settings").after(el("details", {}, el("summary", {}, "The space that was searched"), el("pre", {}, JSON.stringify(space, null, 1))));
}

// proxy.tasks.text.lr, as it would be written in a file
function flat(data, prefix = "") {
  return Object.entries(data).flatMap(([name, of]) => {
    if (of === null) return [];
    return typeof of === "object" && !Array.isArray(of) ? flat(of, `${prefix}${name}.`) : [[prefix + name, Array.isArray(of) ? of.join(", ") : value(of)]];
  });
}

// the panel: #trial-12, #entry-0

let opener = null;

function target() {
  const found = /^#(trial|entry)-(\d+)$/.exec(location.hash);
  if (!found) return null;
  return found[1] === "trial" ? trial.get(Number(found[2])) : R.entries[Number(found[2])];
}

function showPanel() {
  const one = target();
  document.querySelectorAll("tr.open").forEach((row) => row.classList.remove("open"));
  if (!one) return hidePanel();
  if ($("panel").hidden) opener = document.activeElement;
  const title = known(one.trial) ? `Trial ${one.trial}` : one.name;
  const close = el("button", { type: "button", id: "close", "aria-label": "Close", onclick: leave }, "Close");
  $("panel").replaceChildren(
    el("header", {}, el("h2", { id: "panel-title" }, `${title} `, el("span", { class: `tag ${one.role || ""}` }, one.role || one.outcome)), close),
    el("p", {}, one.words), known(one.trial) ? facts(trialFacts(one)) : facts([["parameters", one.params.toLocaleString("en")], ["FLOPs/token", short(one.flops_per_token)]]),
    ...specOf(one), ...(known(one.trial) ? details(one) : []));
  $("panel").hidden = false;
  $("panel").scrollTop = 0;
  close.focus({ preventScroll: true });
  if (known(one.trial)) document.querySelector(`tr[data-trial="${one.trial}"]`)?.classList.add("open");
}

function trialFacts(one) {
  const found = [["loss", nats(lossOf(one)) + (rank.has(one.trial) ? `, rank ${rank.get(one.trial) + 1} of ${ranked.length}` : "")], ["FLOPs/token", short(flopsOf(one))], ["parameters", one.params.toLocaleString("en")], ["KV cache", `${one.kv_bytes_per_token.toLocaleString("en")} bytes per token`]];
  if (known(one.same_as)) found.push(["same model as", el("a", { href: `#trial-${one.same_as}` }, `trial ${one.same_as}`)]);
  if (one.error) found.push(["error", el("span", { class: "warn" }, one.error)]);
  return [...found, ["fingerprint", one.fingerprint]];
}

function details(one) {
  const scores = one.rungs.flatMap((rung, i) => Object.entries(rung).map(([task, score]) => [String(i + 1), el("td", { class: "left" }, task), String(score.steps), known(score.loss) ? nats(score.loss) : "diverged", known(score.accuracy) ? percent(score.accuracy) : "–", duration(score.seconds)]));
  const parts = scores.length ? [el("h3", {}, "Scores"), table(["rung", el("th", { class: "left", scope: "col" }, "task"), "steps", "loss", "right", "time"], scores)] : [];
  const choices = Object.entries(one.choices).map(([leaf, of]) => [el("code", {}, leaf), value(of)]);
  return choices.length ? [...parts, el("h3", {}, "Choices"), facts(choices)] : parts;
}

function specOf(one) {
  const text = el("pre", { tabindex: "0", id: "spec" }, one.spec);
  const copy = el("button", { type: "button", id: "copy", onclick: async () => {
    try {
      await navigator.clipboard.writeText(one.spec);
      copy.textContent = "Copied";
    } catch { // a browser may forbid it to files; what is selected can be copied by hand
      getSelection().selectAllChildren(text);
      copy.textContent = "Selected: now copy";
    }
  } }, "Copy");
  return [el("h3", {}, "Spec", copy), text];
}

function leave() {
  history.pushState(null, "", location.pathname + location.search);
  hidePanel();
}
function hidePanel() {
  if ($("panel").hidden) return;
  $("panel").hidden = true;
  document.querySelectorAll("tr.open").forEach((row) => row.classList.remove("open"));
  opener?.focus({ preventScroll: true });
}

function showNav() {
  const sections = [...document.querySelectorAll("main section")];
  const links = new Map(sections.map((section) => [section, el("a", { href: `#${section.id}` }, section.dataset.short || section.querySelector("h2").textContent)]));
  $("nav").append(...links.values());
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const [section, link] of links) section === entry.target ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
    }
  }, { rootMargin: "-15% 0px -80% 0px" });
  sections.forEach((section) => near.observe(section));
}

showNav();
for (const show of [showFigures, showFront, showControls, showCurves, showChoices, showRouters, showWinner, showTrust, showSpent, showTrials, showAgain]) show();
addEventListener("hashchange", showPanel);
addEventListener("popstate", showPanel);
addEventListener("keydown", (event) => { if (event.key === "Escape" && !$("panel").hidden) leave(); });
showPanel();
