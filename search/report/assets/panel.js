// The panel that shows one spec; the address says which: #trial-12 or #entry-0.
"use strict";

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
    el(
      "header",
      {},
      el(
        "h2",
        { id: "panel-title" },
        `${title} `,
        el("span", { class: `tag ${one.role || ""}` }, one.role || one.outcome),
      ),
      close,
    ),
    el("p", {}, one.words),
    known(one.trial)
      ? facts(trialFacts(one))
      : facts([
          ["parameters", one.params.toLocaleString("en")],
          ["FLOPs/token", bothFlops(one)],
        ]),
    ...specOf(one),
    ...(known(one.trial) ? details(one) : []),
  );
  $("panel").hidden = false;
  $("panel").scrollTop = 0;
  close.focus({ preventScroll: true });
  if (known(one.trial)) document.querySelector(`tr[data-trial="${one.trial}"]`)?.classList.add("open");
}

function trialFacts(one) {
  const found = [
    ["loss", nats(lossOf(one)) + (rank.has(one.trial) ? `, rank ${rank.get(one.trial) + 1} of ${ranked.length}` : "")],
    ["FLOPs/token", bothFlops(one)],
    ["parameters", one.params.toLocaleString("en")],
    ["KV cache", `${one.kv_bytes_per_token.toLocaleString("en")} bytes per token`],
  ];
  if (known(one.same_as))
    found.push(["same model as", el("a", { href: `#trial-${one.same_as}` }, `trial ${one.same_as}`)]);
  if (one.error) found.push(["error", el("span", { class: "warn" }, one.error)]);
  return [...found, ["fingerprint", one.fingerprint]];
}

function details(one) {
  const scores = one.rungs.flatMap((rung, i) =>
    Object.entries(rung).map(([task, score]) => [
      String(i + 1),
      el("td", { class: "left" }, task),
      String(score.steps),
      known(score.loss) ? nats(score.loss) : "diverged",
      known(score.bits_per_byte) ? score.bits_per_byte.toFixed(3) : "–",
      known(score.accuracy) ? percent(score.accuracy) : "–",
      duration(score.seconds),
    ]),
  );
  const parts = scores.length
    ? [
        el("h3", {}, "Scores"),
        table(["rung", el("th", { class: "left", scope: "col" }, "task"), "steps", "loss", "bits/byte", "accuracy", "time"], scores),
      ]
    : [];
  const choices = Object.entries(one.choices).map(([leaf, of]) => [el("code", {}, leaf), value(of)]);
  return choices.length ? [...parts, el("h3", {}, "Choices"), facts(choices)] : parts;
}

function specOf(one) {
  const text = el("pre", { tabindex: "0", id: "spec" }, one.spec);
  const copy = el(
    "button",
    {
      type: "button",
      id: "copy",
      onclick: async () => {
        try {
          await navigator.clipboard.writeText(one.spec);
          copy.textContent = "Copied";
        } catch {
          // Some browsers forbid this to local files. Then the text is selected, to be copied by hand.
          getSelection().selectAllChildren(text);
          copy.textContent = "Selected: press Ctrl+C";
        }
      },
    },
    "Copy",
  );
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
