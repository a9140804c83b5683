// What it is and what it took: the winner's nodes, the ranking's trust, the sums, the settings.
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
  $("winner-tree").append(table(["", "parameters", "FLOPs/token", "share", ""], rows, { class: "tree" }));
}

function tauWords(found) {
  if (!found || !known(found.tau)) return `too few pairs (${found ? found.pairs : 0}) to say`;
  const interval = known(found.low) ? ` (95%: ${found.low.toFixed(2)} to ${found.high.toFixed(2)})` : "";
  return `tau ${found.tau.toFixed(2)}${interval} over ${found.pairs} trials`;
}

function showTrust() {
  const own = R.trust,
    shared = R.shared;
  const climbed = ranked
    .filter((one) => one.rungs.length > 1 && known(objective(one.rungs[0])))
    .map((one) => [one.trial, objective(one.rungs[0]), lossOf(one)]);
  const shown = [];
  if (climbed.length)
    shown.push([
      "First rung and last rung",
      own && tauWords(own.between_rungs),
      climbed,
      "loss at the first rung",
      "loss at the last rung",
    ]);
  if (own && own.points.length)
    shown.push([
      `The proxy and one of width ${own.width}`,
      tauWords(own.wider),
      own.points.map((p) => [p.number, p.loss, p.wider_loss]).filter(pairKnown),
      "loss of the proxy",
      `loss at width ${own.width}`,
    ]);
  if (shared)
    shown.push([
      "Shared weights and training alone",
      `${tauWords(shared.correlation)}; one training of ${flops(shared.shared_flops)} FLOPs for ${shared.settings} models, ${flops(shared.alone_flops)} for these ${shared.points.length} alone`,
      shared.points.map((p) => [p.trial, p.shared, p.alone]).filter(pairKnown),
      "loss with shared weights",
      "loss trained alone",
    ]);
  if (!shown.length) return absent("trust", "Not measured: no trial climbed more than one rung.");
  for (const [title, said, pairs, across, up] of shown) {
    const node = el("div", { class: "plot square" });
    $("trust-plots").append(el("div", {}, el("h3", {}, title), el("p", { class: "soft" }, said), node));
    plot(node, () => agreement(pairs, across, up));
  }
}
const pairKnown = ([, x, y]) => known(x) && known(y);

function showSpent() {
  const spent = R.spent,
    used = {
      seconds: spent.wall_seconds,
      time: spent.wall_seconds,
      train_flops: spent.train_flops,
      trials: R.trials.length,
    };
  const say = { seconds: duration, time: duration, train_flops: (n) => flops(n) + " FLOPs", trials: String };
  const target = $("spent-bars");
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
      el("h3", {}, "Of what was allowed"),
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
      phased("Time of the workers, by phase", "seconds", duration),
      phased("Training FLOPs, by phase", "train_flops", flops),
    ),
  );
  const outcomes = Object.entries(spent.outcomes).sort((a, b) => b[1] - a[1]),
    draws = outcomes.reduce((total, [, n]) => total + n, 0) || 1;
  target.append(
    el("h3", {}, "How the draws ended"),
    ...outcomes.map(([name, n]) => bar(words(name), n / draws, `${n}, ${percent(n / draws)}`)),
  );
}

function showAgain() {
  $("command").textContent = R.command || "";
  const { space, ...settings } = R.settings;
  const list = (title, data) => el("div", {}, el("h3", {}, title), facts(flat(data)));
  $("settings").append(list("Settings", settings), list("Versions", R.versions));
  if (space)
    $("settings").after(
      el(
        "details",
        {},
        el("summary", {}, "The space that was searched"),
        el("pre", {}, JSON.stringify(space, null, 1)),
      ),
    );
}

// proxy.tasks.text.lr, as it would be written in a file
function flat(data, prefix = "") {
  return Object.entries(data).flatMap(([name, of]) => {
    if (of === null) return [];
    return typeof of === "object" && !Array.isArray(of)
      ? flat(of, `${prefix}${name}.`)
      : [[prefix + name, Array.isArray(of) ? of.join(", ") : value(of)]];
  });
}
