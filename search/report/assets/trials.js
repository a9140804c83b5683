// The table of all trials, sorted and filtered.
"use strict";

const COLUMNS = [
  ["trial", (one) => one.trial],
  ["outcome", (one) => one.outcome],
  ["loss", lossOf],
  ...(MEASURED ? [["executed FLOPs/token", executedOf]] : []),
  ["nominal FLOPs/token", (one) => one.flops_per_token],
  ...R.axes
    .filter((axis) => !["loss", "flops", "params", "kv"].includes(axis))
    .map((axis) => [words(axis), (one) => one.values?.[axis]]),
  ["parameters", (one) => one.params],
  ["KV/token", (one) => one.kv_bytes_per_token],
  ...(TASKS.length > 1 ? TASKS.map((task) => [task, (one) => last(one)?.[task]?.loss]) : []),
  ["model", (one) => one.words],
];
const SAID = { loss: nats, parameters, "KV/token": (n) => short(n) + "B" };

function trialRow(one) {
  const cells = COLUMNS.map(([name, read]) => {
    const found = read(one);
    if (name === "trial") return el("td", {}, el("a", { href: `#trial-${one.trial}` }, String(one.trial)));
    if (name === "outcome")
      return el(
        "td",
        { class: "left" },
        `${one.outcome} `,
        one.trial === R.winner
          ? el("span", { class: "tag winner" }, "winner")
          : front.has(one.trial)
            ? el("span", { class: "tag front" }, "front")
            : null,
      );
    if (name === "model")
      return el("td", { class: "left long" }, one.words, one.error ? el("small", {}, one.error) : null);
    return el("td", {}, known(found) ? (SAID[name] || (TASKS.includes(name) ? nats : short))(found) : "–");
  });
  return el(
    "tr",
    {
      class: rank.has(one.trial) ? null : "quiet",
      "data-trial": one.trial,
      onclick: (event) => {
        if (!event.target.closest("a")) location.hash = `trial-${one.trial}`;
      },
    },
    cells,
  );
}

function showTrials() {
  const rows = new Map(R.trials.map((one) => [one.trial, trialRow(one)]));
  const head = COLUMNS.map(([name], i) =>
    el(
      "th",
      { scope: "col", class: ["outcome", "model"].includes(name) ? "left" : null, "aria-sort": i ? null : "ascending" },
      el("button", { type: "button", onclick: () => sort(i) }, name),
    ),
  );
  const body = table(head, [...rows.values()]);
  $("trials-table").append(body);
  function sort(i) {
    const down = head[i].getAttribute("aria-sort") === "ascending";
    head.forEach((cell, j) =>
      j === i ? cell.setAttribute("aria-sort", down ? "descending" : "ascending") : cell.removeAttribute("aria-sort"),
    );
    const read = COLUMNS[i][1];
    const order = [...R.trials].sort((a, b) => compare(read(a), read(b), down) || a.trial - b.trial);
    body.tBodies[0].append(...order.map((one) => rows.get(one.trial)));
  }
  const texts = new Map(
    R.trials.map((one) => [
      one.trial,
      [
        one.trial,
        one.outcome,
        one.words,
        one.error,
        one.fingerprint,
        ...Object.entries(one.choices).map(([leaf, of]) => `${leaf}=${value(of)}`),
      ]
        .join(" ")
        .toLowerCase(),
    ]),
  );
  const filter = () => {
    const sought = $("find").value.trim().toLowerCase().split(/\s+/),
      outcome = $("outcome").value;
    let count = 0;
    for (const one of R.trials) {
      const stays =
        (!outcome || one.outcome === outcome) && sought.every((word) => texts.get(one.trial).includes(word));
      rows.get(one.trial).hidden = !stays;
      count += stays;
    }
    $("found").textContent = `${count} of ${R.trials.length}`;
  };
  $("outcome").append(
    el("option", { value: "" }, "any"),
    ...[...new Set(R.trials.map((one) => one.outcome))].sort().map((name) => el("option", { value: name }, name)),
  );
  $("find").addEventListener("input", filter);
  $("outcome").addEventListener("change", filter);
  filter();
}

// Rows without a value come last in both directions.
function compare(a, b, down) {
  if (!known(a) || !known(b)) return known(b) - known(a);
  return (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1);
}
