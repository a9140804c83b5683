// Learning curves by rung, and scatter plots of two scores of the same trials.
"use strict";

const BANDS = 12;
function curvesPicture(task) {
  const shades = [
    [0, colour("best")],
    [1, colour("worst")],
  ];
  const trained = R.trials.filter((one) => one.outcome !== "reused" && one.rungs.some((rung) => rung[task]));
  const band = (one) => (rank.has(one.trial) ? Math.floor((BANDS * rank.get(one.trial)) / ranked.length) : -1);
  const data = [];
  for (let i = BANDS - 1; i >= 0; i--)
    data.unshift(
      lines(
        trained.filter((one) => band(one) === i),
        task,
        mixed((i + 0.5) / BANDS),
        1.2,
      ),
    );
  data.unshift(
    lines(
      trained.filter((one) => band(one) < 0),
      task,
      colour("faint"),
      0.8,
    ),
  );
  const dots = trained.flatMap((one) =>
    one.rungs.filter((rung) => rung[task] && known(rung[task].loss)).map((rung) => [one, rung[task]]),
  );
  const at = (some, marker, name) => ({
    type: "scatter",
    mode: "markers",
    hoverinfo: "text",
    name,
    marker,
    x: some.map(([, score]) => score.steps),
    y: some.map(([, score]) => score.loss),
    customdata: some.map(([one]) => `trial-${one.trial}`),
    text: some.map(
      ([one, score]) =>
        `<b>trial ${one.trial}</b>${rank.has(one.trial) ? `, rank ${rank.get(one.trial) + 1}` : ", " + escaped(one.outcome)}<br>${wrapped(one.words)}<br>${escaped(task)} ${nats(score.loss)} after ${score.steps} steps`,
    ),
  });
  const grey = dots.filter(([one]) => !rank.has(one.trial)),
    ended = dots.filter(([one]) => rank.has(one.trial));
  data.push(at(grey, { color: colour("faint"), size: 6 }, "stopped early"));
  data.push(
    at(
      ended,
      {
        color: ended.map(([one]) => rank.get(one.trial) + 1),
        colorscale: shades,
        cmin: 1,
        cmax: Math.max(2, ranked.length),
        size: 8,
        line: { color: colour("paper"), width: 1 },
        showscale: true,
        colorbar: {
          title: { text: "final rank", side: "right" },
          thickness: 12,
          outlinewidth: 0,
          tick0: 1,
          dtick: Math.ceil(ranked.length / 8) || 1,
        },
      },
      "rungs",
    ),
  );
  const heights = [
    ...dots.map(([, score]) => score.loss),
    ...trained.flatMap((one) => beyond(last(one)[task]?.curve || [])),
  ];
  const low = Math.min(...heights),
    high = Math.max(...heights),
    room = 0.05 * (high - low || 1);
  return {
    data,
    layout: {
      showlegend: false,
      xaxis: { title: { text: "steps trained" }, rangemode: "tozero" },
      yaxis: { title: { text: `${task}: loss, nats` }, range: [low - room, high + room] },
    },
  };
}

// Leaves out the first tenth of a curve: its losses are so high that they would compress the rest.
const beyond = (curve) => curve.slice(Math.floor(curve.length / 10)).map(([, loss]) => loss);

function lines(some, task, shade, width) {
  const curves = some.map((one) => last(one)[task]?.curve || []);
  return {
    type: "scatter",
    mode: "lines",
    hoverinfo: "skip",
    line: { color: shade, width },
    connectgaps: false,
    x: curves.flatMap((curve) => [...curve.map(([step]) => step), null]),
    y: curves.flatMap((curve) => [...curve.map(([, loss]) => loss), null]),
  };
}

// A colour between that of the best and that of the worst trial.
function mixed(share) {
  const parts = (text) => [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
  const low = parts(colour("best")),
    high = parts(colour("worst"));
  return `rgb(${low.map((part, i) => Math.round(part + (high[i] - part) * share)).join(",")})`;
}

function agreement(pairs, across, up) {
  const data = [
    {
      type: "scatter",
      mode: "markers",
      hoverinfo: "text",
      x: pairs.map(([, x]) => x),
      y: pairs.map(([, , y]) => y),
      customdata: pairs.map(([number]) => `trial-${number}`),
      marker: { color: colour("accent"), size: 9, opacity: 0.85 },
      text: pairs.map(
        ([number, x, y]) =>
          `<b>trial ${number}</b><br>${wrapped(trial.get(number)?.words || "")}<br>${nats(x)}, then ${nats(y)}`,
      ),
    },
  ];
  return { data, layout: { showlegend: false, xaxis: { title: { text: across } }, yaxis: { title: { text: up } } } };
}
