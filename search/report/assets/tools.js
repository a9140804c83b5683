// Helpers of all sections: the result, numbers as text, elements. Text from the result enters the
// page as text only, never as markup.
"use strict";

const R = JSON.parse(document.getElementById("result").textContent);
// Results written by earlier versions say "control" where newer ones say "baseline".
for (const entry of R.entries) if (entry.role === "control") entry.role = "baseline";
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false)
      node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const known = (value) => value !== null && value !== undefined;

function short(number) {
  for (const [unit, size] of [
    ["T", 1e12],
    ["G", 1e9],
    ["M", 1e6],
    ["k", 1e3],
  ]) {
    if (number >= size) return (number / size).toFixed(number / size >= 10 ? 1 : 2) + unit;
  }
  return String(Math.round(number * 100) / 100);
}
const parameters = (number) => short(number).replace("G", "B");
const flops = (number) => (number >= 1e15 ? (number / 1e15).toFixed(2) + "P" : short(number));
const nats = (number) => (known(number) ? number.toFixed(3) : "–");
const signed = (number) => (number < 0 ? "−" : "+") + Math.abs(number).toFixed(3);
const bitsPerByte = (number) => `${number.toFixed(3)} bits per byte`;
const percent = (share) => (100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0) + "%";
function duration(seconds) {
  if (seconds < 120) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  return seconds < 7200 ? `${(seconds / 60).toFixed(seconds < 600 ? 1 : 0)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
function value(of) {
  if (of === null) return "none";
  return typeof of === "object" ? JSON.stringify(of) : String(of);
}
const mean = (numbers) => numbers.reduce((sum, number) => sum + number, 0) / numbers.length;
const words = (name) => name.replaceAll("_", " ");

// Views of the result.
const WEIGHTS = Object.fromEntries(Object.entries(R.settings.proxy.tasks).map(([task, given]) => [task, given.weight]));
const TASKS = Object.keys(WEIGHTS);
const trial = new Map(R.trials.map((one) => [one.trial, one]));
const front = new Set(R.front);
const winner = R.entries.find((entry) => entry.role === "winner");
const ranked = R.trials
  .filter((one) => one.values && known(one.values.loss))
  .sort((a, b) => a.values.loss - b.values.loss);
const rank = new Map(ranked.map((one, i) => [one.trial, i]));
const last = (one) => one.rungs[one.rungs.length - 1];

function objective(rung) {
  let sum = 0;
  for (const task of TASKS) {
    if (!rung || !rung[task] || !known(rung[task].loss)) return null;
    sum += WEIGHTS[task] * rung[task].loss;
  }
  return sum;
}
const lossOf = (one) => (one.values && known(one.values.loss) ? one.values.loss : objective(last(one)));
// FLOPs are nominal at the routers' capacities, and executed at the shares that routers selected. Those
// of trials were measured if they were an objective; results of earlier versions have none of entries.
const MEASURED = R.axes.includes("flops");
const WHICH = MEASURED ? "executed" : "nominal";
const executedOf = (one) => (known(one.values?.flops) ? one.values.flops : (one.executed_flops_per_token ?? null));
const flopsOf = (one) => (MEASURED ? (executedOf(one) ?? one.flops_per_token) : one.flops_per_token);
const finite = (numbers) => numbers.filter(known);

const AXES = {
  loss: `held-out loss: ${R.objective}`,
  flops: `${WHICH} FLOPs per token`,
  params: "parameters",
  kv: "KV cache bytes per token",
  heaviest: "FLOPs of the heaviest token",
};
const axisName = (axis) => AXES[axis] || words(axis);

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function table(head, rows, attributes = {}) {
  const cell = (tag) => (content) =>
    content instanceof HTMLTableCellElement ? content : el(tag, tag === "th" ? { scope: "col" } : {}, content);
  return el(
    "table",
    attributes,
    el("thead", {}, el("tr", {}, head.map(cell("th")))),
    el(
      "tbody",
      {},
      rows.map((row) => (row instanceof HTMLTableRowElement ? row : el("tr", {}, row.map(cell("td"))))),
    ),
  );
}

function facts(pairs) {
  return el(
    "dl",
    { class: "facts" },
    pairs.map(([name, fact]) => [el("dt", {}, name), el("dd", {}, fact)]),
  );
}

function bar(name, share, said, over = false) {
  const inside = el("span", { class: over ? "fill over" : "fill" });
  inside.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
  return el(
    "div",
    { class: "bar" },
    el("span", {}, name),
    el("div", { class: "track" }, inside),
    el("output", {}, said),
  );
}

function switcher(label, names, choose) {
  const buttons = names.map((name, i) =>
    el(
      "button",
      {
        type: "button",
        "aria-pressed": String(i === 0),
        onclick: () => {
          buttons.forEach((other, j) => other.setAttribute("aria-pressed", String(i === j)));
          choose(name);
        },
      },
      name,
    ),
  );
  return el("div", { class: "switch", role: "group", "aria-label": label }, buttons);
}

function absent(section, why) {
  const part = $(section);
  part.replaceChildren(part.querySelector("h2"), el("p", { class: "soft" }, why));
}
