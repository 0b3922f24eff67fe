"use strict";
// Heat maps and timelines.

const LARGEST_ZOOM = 64;
let hatches = 0;

function drawHeat(panel, report, width) {
  const cells = panel.values.flatMap((row, index) => row.map((value, place) => ({
    x: panel.xs[place], y: panel.ys[index], value,
  })));
  const known = cells.filter((cell) => Number.isFinite(cell.value));
  const missing = cells.filter((cell) => !Number.isFinite(cell.value));
  const { factor, unit } = unitOf(panel.value, known.map((cell) => Math.abs(cell.value)));
  const letters = d3.max(panel.ys, (name) => name.length) ?? 0;
  const room = Math.min(width * 0.4, 34 + 6.6 * letters);
  // Names of columns that would touch are left out, evenly.
  const widest = 10 + 6.6 * (d3.max(panel.xs, (name) => name.length) ?? 1);
  const step = Math.max(1, Math.ceil((panel.xs.length * widest) / Math.max(1, width - room - 16)));
  const rows = Math.max(160, Math.min(26 * panel.ys.length, 420));
  const stepY = Math.max(1, Math.ceil((14 * panel.ys.length) / rows));
  const text = (cell) => [
    `${panel.x.name} ${cell.x}`, `${panel.y.name} ${cell.y}`,
    `${panel.value.name} ${Number.isFinite(cell.value) ? formatValue(cell.value, panel.value) : "no value"}`,
  ].join("\n");
  const hatch = `hatch-${hatches++}`;
  const chart = plot(width, {
    height: 58 + rows,
    marginLeft: room,
    marginTop: 10,
    padding: 0.04,
    x: { label: axisLabel(panel.x, panel.x.unit), labelArrow: "none", domain: panel.xs, ticks: panel.xs.filter((_, index) => index % step === 0), tickRotate: 0 },
    y: { label: axisLabel(panel.y, panel.y.unit), labelArrow: "none", domain: panel.ys, ticks: panel.ys.filter((_, index) => index % stepY === 0), tickFormat: (name) => shorten(name, Math.floor((room - 24) / 6.6)) },
    color: {
      type: panel.value.form === "log" ? "log" : "linear", scheme: "viridis",
      label: axisLabel(panel.value, unit), domain: limits(known.map((cell) => cell.value * factor)),
    },
    marks: [
      Plot.cell(known, { x: "x", y: "y", fill: (cell) => cell.value * factor }),
      Plot.cell(missing, { x: "x", y: "y", fill: `url(#${hatch})` }),
      Plot.tip(cells, Plot.pointer({ x: "x", y: "y", title: text })),
    ],
  });
  chart.prepend(makeSvg("defs", {}, hatching(hatch)));
  const parts = [];
  if (known.length) parts.push(chart.legend("color", { width: Math.min(260, width), style: { fontSize: "12px", background: "transparent" } }));
  if (missing.length) {
    const own = `hatch-${hatches++}`;
    const sample = makeSvg("svg", { width: 14, height: 10, "aria-hidden": "true" },
      makeSvg("defs", {}, hatching(own)), makeSvg("rect", { width: 14, height: 10, fill: `url(#${own})` }));
    parts.push(make("ul", { className: "legend" }, make("li", {}, sample, make("span", { textContent: "no value" }))));
  }
  return [chart, make("div", { className: "row" }, ...parts)];
}

function hatching(id) {
  const line = makeSvg("path", { d: "M0 6 L6 0", style: "stroke:currentColor;stroke-opacity:.35" });
  return makeSvg("pattern", { id, width: 6, height: 6, patternUnits: "userSpaceOnUse" }, line);
}

/** Lanes over time. The names of the lanes stay where they are while a wide chart scrolls. */
function drawTimeline(panel, report, width, choices) {
  const lanes = unique(panel.stretches.map((each) => each.lane));
  const groups = unique(panel.stretches.map((each) => each.group));
  const colours = coloursOf(groups);
  const end = d3.max(panel.stretches, (each) => each.end) ?? 1;
  const [factor, unit] = end > 7200 ? [1 / 3600, "h"] : end > 300 ? [1 / 60, "min"] : [1, "s"];
  const room = Math.min(width * 0.35, 20 + 6.6 * (d3.max(lanes, (lane) => lane.length) ?? 1));
  const height = 56 + 34 * lanes.length;
  const common = { height, marginTop: 12, y: { domain: lanes, type: "band", label: null, padding: 0.25, axis: null } };
  const names = plot(room, {
    ...common, marginLeft: 0, marginRight: 0, x: { axis: null, domain: [0, 1] },
    marks: [Plot.text(lanes, {
      x: () => 0, y: (lane) => lane, textAnchor: "start",
      text: (lane) => shorten(lane, Math.floor((room - 8) / 6.6)),
    })],
  });
  names.setAttribute("aria-hidden", "true");
  const scroller = make("div", { className: "lanes-scroll", tabIndex: 0, role: "region", ariaLabel: `${panel.title}, scrolls sideways` });
  const text = (each) => [
    [each.lane, each.group, each.label].filter(Boolean).join(" · "),
    `${formatNumber(each.start)} s to ${formatNumber(each.end)} s: ${formatNumber(each.end - each.start)} s`,
  ].join("\n");

  names.style.setProperty("--share", room);
  scroller.style.setProperty("--share", width - room);

  function draw() {
    const wide = (width - room) * (printing ? 1 : choices.zoom);
    scroller.replaceChildren(plot(wide, {
      ...common, marginLeft: 14,
      x: { label: `time since the beginning (${unit})`, labelArrow: "none", domain: [0, end * factor], ticks: wide / 90 },
      marks: [
        Plot.gridX({ strokeOpacity: 0.12 }),
        Plot.barX(panel.stretches, {
          x1: (each) => each.start * factor, x2: (each) => each.end * factor, y: "lane",
          fill: (each) => colours.get(each.group), title: text, tip: true,
        }),
      ],
    }));
    wider.disabled = choices.zoom >= LARGEST_ZOOM;
    narrower.disabled = choices.zoom <= 1;
  }

  function zoom(by) {
    // The middle of what is seen stays in the middle.
    const middle = (scroller.scrollLeft + scroller.clientWidth / 2) / scroller.scrollWidth;
    choices.zoom = Math.max(1, Math.min(LARGEST_ZOOM, choices.zoom * by));
    draw();
    scroller.scrollLeft = middle * scroller.scrollWidth - scroller.clientWidth / 2;
  }

  choices.zoom ??= 1;
  const narrower = make("button", { type: "button", className: "button", textContent: "−", ariaLabel: "Less detail", onclick: () => zoom(1 / 2) });
  const wider = make("button", { type: "button", className: "button", textContent: "+", ariaLabel: "More detail", onclick: () => zoom(2) });
  draw();
  const items = groups.map((name) => ({ name, colour: colours.get(name) }));
  return [
    make("div", { className: "lanes" }, names, scroller),
    make("div", { className: "row" }, legend(items), make("div", { className: "zoom" }, narrower, wider)),
  ];
}
