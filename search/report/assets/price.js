// The winner's parts, the validation of the ranking, the spending, the settings.
"use strict";

function showWinner() {
  const own = winner || trial.get(R.winner);
  if (!own) return absent("winner", "No trial reached the last rung.");
  $("winner-words").append(`${own.words}. `, el("a", { href: `#trial-${R.winner}` }, "Its spec"));
  const most = Math.max(...R.tree.slice(1).map((row) => row.share), 1e-9);
  const rows = R.tree.map((row) => {
    const inside = el("span", { class: "fill" });
    inside.style.width = `${Math.min(100, (100 * row.share) / most)}%`;
    return [
      row.node,
      row.params.toLocaleString("en"),
      short(row.flops),
      percent(row.share),
      el("span", { class: "track" }, inside),
    ];
  });
  $("winner-tree").append(table(["", "parameters", "nominal FLOPs/token", "share", ""], rows, { class: "tree" }));
}

function tauText(found) {
  if (!found || !known(found.tau)) return `too few trials (${found ? found.pairs : 0}) for a correlation`;
  const interval = known(found.low) ? ` (95% interval ${found.low.toFixed(2)} to ${found.high.toFixed(2)})` : "";
  return `Kendall's tau ${found.tau.toFixed(2)}${interval} over ${found.pairs} trials`;
}

function showValidation() {
  const own = R.trust,
    shared = R.shared;
  const rungs = ranked
    .filter((one) => one.rungs.length > 1 && known(objective(one.rungs[0])))
    .map((one) => [one.trial, objective(one.rungs[0]), lossOf(one)]);
  const shown = [];
  if (rungs.length)
    shown.push([
      "First rung and last rung",
      own && tauText(own.between_rungs),
      rungs,
      "loss at the first rung",
      "loss at the last rung",
    ]);
  if (own && own.points.length)
    shown.push([
      `The proxy and a wider proxy (width ${own.width})`,
      tauText(own.wider),
      own.points.map((p) => [p.number, p.loss, p.wider_loss]).filter(pairKnown),
      "loss of the proxy",
      `loss at width ${own.width}`,
    ]);
  if (shared)
    shown.push([
      "Weights of the supernets and separate training",
      `${tauText(shared.correlation)}; training the supernets took ${flops(shared.shared_flops)} FLOPs for ${shared.settings} models, training these ${shared.points.length} models separately took ${flops(shared.alone_flops)}`,
      shared.points.map((p) => [p.trial, p.shared, p.alone]).filter(pairKnown),
      "loss with the weights of a supernet",
      "loss when trained separately",
    ]);
  if (!shown.length) return absent("validation", "Not measured: no trial was trained on more than one rung.");
  for (const [title, said, pairs, across, up] of shown) {
    const node = el("div", { class: "plot square" });
    $("validation-plots").append(el("div", {}, el("h3", {}, title), el("p", { class: "soft" }, said), node));
    plot(node, () => agreement(pairs, across, up));
  }
}
const pairKnown = ([, x, y]) => known(x) && known(y);

function showSpending() {
  const spent = R.spent,
    used = {
      seconds: spent.wall_seconds,
      time: spent.wall_seconds,
      train_flops: spent.train_flops,
      trials: R.trials.length,
    };
  const say = { seconds: duration, time: duration, train_flops: (n) => flops(n) + " FLOPs", trials: String };
  const target = $("spending-bars");
  const phases = Object.entries(spent.by_phase),
    sum = (key) => phases.reduce((total, [, phase]) => total + phase[key], 0) || 1;
  target.append(
    facts([
      ["wall time", duration(spent.wall_seconds)],
      ["time of all workers", duration(spent.worker_seconds)],
      ["training", flops(spent.train_flops) + " FLOPs"],
      ["scoring", flops(spent.eval_flops) + " FLOPs"],
    ]),
  );
  const limits = Object.entries(spent.limits).filter(([name, limit]) => known(limit) && known(used[name]));
  if (limits.length)
    target.append(
      el("h3", {}, "Used, as a share of the limits"),
      ...limits.map(([name, limit]) =>
        bar(
          name === "seconds" ? "time" : words(name),
          used[name] / limit,
          `${say[name](used[name])} of ${say[name](limit)}`,
          used[name] > limit,
        ),
      ),
    );
  const phased = (title, key, say) =>
    el(
      "div",
      {},
      el("h3", {}, title),
      ...phases.map(([name, phase]) =>
        bar(words(name), phase[key] / sum(key), `${say(phase[key])}, ${percent(phase[key] / sum(key))}`),
      ),
    );
  target.append(
    el(
      "div",
      { class: "pair" },
      phased("Seconds of all workers, by phase", "seconds", duration),
      phased("Training FLOPs, by phase", "train_flops", flops),
    ),
  );
  const outcomes = Object.entries(spent.outcomes).sort((a, b) => b[1] - a[1]),
    trials = outcomes.reduce((total, [, n]) => total + n, 0) || 1;
  target.append(
    el("h3", {}, "Outcomes of the trials"),
    ...outcomes.map(([name, n]) => bar(words(name), n / trials, `${n}, ${percent(n / trials)}`)),
  );
}

function showSettings() {
  $("command").textContent = R.command || "";
  const { space, ...settings } = R.settings;
  const list = (title, data) => el("div", {}, el("h3", {}, title), facts(flat(data)));
  $("settings-lists").append(list("Settings", settings), list("Versions", R.versions));
  if (space)
    $("settings-lists").after(
      el(
        "details",
        {},
        el("summary", {}, "The search space"),
        el("pre", {}, JSON.stringify(space, null, 1)),
      ),
    );
}

// Nested settings as paths such as proxy.tasks.text.lr.
function flat(data, prefix = "") {
  return Object.entries(data).flatMap(([name, of]) => {
    if (of === null) return [];
    return typeof of === "object" && !Array.isArray(of)
      ? flat(of, `${prefix}${name}.`)
      : [[prefix + name, Array.isArray(of) ? of.join(", ") : value(of)]];
  });
}
