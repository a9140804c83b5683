// Drawing with plotly: when, in which colours, and what a click does.
"use strict";

// plotly interprets markup and entities in its texts, in some of them twice. A zero-width space after
// each < and & prevents that.
const escaped = (text) => String(text).replace(/[<&]/g, "$&\u200b");
// plotly does not break lines, so this function does.
function wrapped(text, width = 58) {
  const lines = [""];
  for (const word of String(text).split(" ")) {
    if (lines[lines.length - 1].length + word.length > width) lines.push("");
    lines[lines.length - 1] += word + " ";
  }
  return lines.map((line) => escaped(line.trim())).join("<br>");
}

const drawn = new Map();
const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      draw(entry.target);
    }
  },
  { rootMargin: "400px" },
);

// A plot is drawn when it is scrolled near the window: drawing all plots of 300 trials at once takes
// seconds.
function plot(node, build) {
  drawn.set(node, build);
}

// plotly is the last script, so that everything else is shown before the plots are drawn.
addEventListener("DOMContentLoaded", () => {
  const needs = "This plot needs plotly: run pip install 'archdsl[plots]' and repeat the command.";
  for (const node of drawn.keys()) {
    if (window.Plotly) seen.observe(node);
    else node.replaceChildren(el("p", { class: "absent soft" }, needs));
  }
});

async function draw(node) {
  const { data, layout } = drawn.get(node)();
  const narrow = node.clientWidth < 560;
  const axis = {
    gridcolor: colour("line"),
    linecolor: colour("faint"),
    zeroline: false,
    automargin: true,
    title: { standoff: 10 },
  };
  const look = {
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("soft") },
    margin: { l: 56, r: 12, t: 12, b: 48 },
    // on a touch screen a finger that moves over the plot scrolls the page
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    legend: { orientation: "h", yanchor: "bottom", y: 1.01, x: 0, font: { size: narrow ? 11 : 13 } },
    modebar: { bgcolor: "transparent", color: colour("soft"), activecolor: colour("ink") },
    hoverlabel: {
      bgcolor: colour("raised"),
      bordercolor: colour("faint"),
      font: { color: colour("ink") },
      align: "left",
    },
    ...layout,
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
  };
  await Plotly.react(node, data, look, {
    displaylogo: false,
    responsive: true,
    displayModeBar: narrow ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  });
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
