"use strict";
// Lines and bars, on Observable Plot. Colours are CSS variables, so a theme needs no new drawing.

const COLOURS = 8;
const COMPACT = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 3 });
const DASHES = ["", "6 3", "2 3", "9 3 2 3", "12 4", "2 6"];

/** The colour of a number; after eight the same ones again, nearer to the colour of text. */
function colour(number) {
  const full = `var(--series-${number % COLOURS})`;
  return number < COLOURS ? full : `color-mix(in oklab, ${full} 50%, var(--text))`;
}

/**
 * Colours of groups by their names: charts of the same groups have the same colours, in whatever
 * order their data have them. Waiting is pale, work is not.
 */
function coloursOf(groups) {
  const work = groups.filter((name) => name !== "wait").sort();
  return new Map(groups.map((name) => [name, name === "wait" ? "var(--idle)" : colour(work.indexOf(name))]));
}

/** What all charts have in common. */
function plot(width, options) {
  return Plot.plot({
    width,
    marginTop: 28,
    marginRight: 16,
    marginBottom: 40,
    style: { fontSize: "12px", fontFamily: "inherit", background: "transparent" },
    ...options,
  });
}

/**
 * A legend of text; each item has a sample of its line or its filling. `point` is called with the
 * item under the pointer, and with null when there is none.
 */
function legend(items, point = () => {}) {
  return make("ul", { className: "legend", onpointerleave: () => point(null) }, ...items.map((item) => {
    const sample = makeSvg("svg", { width: item.dash === undefined ? 14 : 22, height: 10, "aria-hidden": "true" });
    if (item.dash === undefined) {
      sample.append(makeSvg("rect", { width: 14, height: 10, rx: 2, style: `fill:${item.colour}` }));
    } else {
      const line = { x1: 0, x2: 22, y1: 5, y2: 5, "stroke-width": 2, "stroke-dasharray": item.dash };
      sample.append(makeSvg("line", { ...line, style: `stroke:${item.colour}` }));
    }
    return make("li", { onpointerenter: () => point(item) }, sample, make("span", { textContent: item.name }));
  }));
}

/** The limits of a scale; one value alone gets some room around it. */
function limits(values) {
  const [low, high] = d3.extent(values);
  if (low !== high || low === undefined) return undefined;
  const room = Math.abs(low) * 0.1 || 1;
  return [low - room, high + room];
}

/** Marks of a logarithmic axis: powers of ten, with 2 and 5 on short ones and with gaps on long ones. */
function logTicks(low, high, most) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const parts = last - first <= 1 ? [1, 2, 5] : [1];
  const step = Math.ceil((last - first + 1) / most);
  return d3.range(first, last + 1).filter((power) => (power - first) % step === 0)
    .flatMap((power) => parts.map((part) => Number(`${part}e${power}`)))
    .filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
}

/** Options of the scale of one axis. `round` extends it to round numbers; `most` = how many marks. */
function scaleOf(axis, unit, values, round, most) {
  const label = { label: axisLabel(axis, unit.unit), labelArrow: "none" };
  const scaled = values.map((value) => value * unit.factor).filter((value) => axis.form !== "log" || value > 0);
  let [low, high] = d3.extent(scaled);
  if (low === undefined) return { ...label, type: "linear", domain: [0, 1], ticks: [] };
  if (axis.form === "log") {
    if (round || low === high) [low, high] = [10 ** Math.floor(Math.log10(low)), 10 ** Math.ceil(Math.log10(high))];
    if (low === high) high *= 10;
    const tickFormat = (value) => (value < 1e-3 || value >= 1e5 ? value.toExponential(0) : formatNumber(value));
    return { ...label, type: "log", domain: [low, high], ticks: logTicks(low, high, most), tickFormat };
  }
  // Between whole numbers there are no marks.
  const whole = scaled.every(Number.isInteger) ? high - low : Infinity;
  const size = Math.max(Math.abs(low), Math.abs(high));
  const tickFormat = size >= 1e5 ? COMPACT.format : size && size < 1e-3 ? (value) => (value ? d3.format(".1~e")(value) : "0") : undefined;
  return { ...label, type: "linear", domain: limits(scaled), nice: round, ticks: Math.max(1, Math.min(whole, most)), tickFormat };
}

/** Names and looks of lines: runs differ in colour and quantities in dashes; one run has both. */
function looksOf(panel, report) {
  const several = report.runs.length > 1;
  const quantities = unique(panel.series.map((series) => series.of));
  return panel.series.map((series) => {
    const number = quantities.indexOf(series.of);
    const run = report.runs[series.run];
    const quantity = series.of || panel.y.name;
    return {
      name: !several ? quantity : quantities.length > 1 ? `${run} · ${quantity}` : run,
      run, quantity,
      colour: colour(several ? series.run : number),
      dash: DASHES[number % DASHES.length],
    };
  });
}

/**
 * The legend of lines; with several runs and quantities, colours and dashes on their own. Pointing
 * at an item makes the other lines pale.
 */
function linesLegend(looks, report, chart) {
  if (looks.length < 2 && report.runs.length < 2) return [];
  const point = (item) => looks.forEach((look, number) => {
    const other = item !== null && ![look.name, look.run, look.quantity].includes(item.name);
    for (const mark of chart.querySelectorAll(`.look-${number}`)) mark.classList.toggle("dim", other);
  });
  const runs = unique(looks.map((look) => look.run));
  const quantities = unique(looks.map((look) => look.quantity));
  if (runs.length < 2 || quantities.length < 2) return [legend(looks, point)];
  const dashes = quantities.map((name) => ({
    name, colour: "currentColor", dash: looks.find((look) => look.quantity === name).dash,
  }));
  const colours = runs.map((name) => ({ name, colour: looks.find((look) => look.run === name).colour }));
  return [legend(dashes, point), legend(colours, point)];
}

function drawLines(panel, report, width) {
  const looks = looksOf(panel, report);
  const numbers = panel.series.flatMap((series) => [...series.y, ...series.low, ...series.high])
    .filter(Number.isFinite);
  const places = panel.series.flatMap((series) => series.x).filter(Number.isFinite);
  const [x, y] = [unitOf(panel.x, places), unitOf(panel.y, numbers)];
  const value = (number, axis, unit) =>
    Number.isFinite(number) && (axis.form !== "log" || number > 0) ? number * unit.factor : NaN;
  const marks = [];
  const rows = new Map();
  panel.series.forEach((series, number) => {
    const points = series.x.map((place, index) => ({
      x: value(place, panel.x, x),
      y: value(series.y[index], panel.y, y),
      low: value(series.low[index], panel.y, y),
      high: value(series.high[index], panel.y, y),
    }));
    const { colour: stroke, dash } = looks[number];
    const common = { x: "x", className: `look-${number}` };
    if (series.low.length) {
      marks.push(Plot.areaY(points, { ...common, y1: "low", y2: "high", fill: stroke, fillOpacity: 0.15 }));
    }
    marks.push(Plot.lineY(points, { ...common, y: "y", stroke, strokeWidth: 1.75, strokeDasharray: dash || undefined }));
    if (points.length <= 40) marks.push(Plot.dot(points, { ...common, y: "y", fill: stroke, r: 2.5 }));
    points.forEach((point, index) => {
      if (!Number.isFinite(point.x)) return;
      if (!rows.has(point.x)) rows.set(point.x, []);
      if (Number.isFinite(series.y[index])) {
        rows.get(point.x).push(`${looks[number].name}  ${formatValue(series.y[index], panel.y)}`);
      }
    });
  });
  const tips = [...rows].map(([place, texts]) => ({ x: place, text: [
    `${panel.x.name} ${formatNumber(place)}${x.unit ? ` ${x.unit}` : ""}`, ...texts].join("\n") }));
  marks.push(
    Plot.ruleX(tips, Plot.pointerX({ x: "x", stroke: "currentColor", strokeOpacity: 0.4, maxRadius: 1e4 })),
    Plot.tip(tips, Plot.pointerX({ x: "x", frameAnchor: "top", title: "text", maxRadius: 1e4, lineWidth: 30, lineHeight: 1.25 })),
  );
  const scaleX = scaleOf(panel.x, x, places, false, Math.floor(width / (panel.x.form === "log" ? 50 : 80)));
  const scaleY = scaleOf(panel.y, y, numbers, true, 5);
  marks.unshift(Plot.gridY({ strokeOpacity: 0.12, ticks: scaleY.ticks }));
  const chart = plot(width, { height: 244, marginLeft: 52, x: scaleX, y: scaleY, marks });
  const parts = linesLegend(looks, report, chart);
  const lost = panel.y.form === "log" ? numbers.filter((number) => number <= 0).length : 0;
  if (lost) parts.push(note(`${lost} values of 0 or less have no place on a logarithmic axis.`));
  return [chart, ...parts];
}

function drawBars(panel, report, width) {
  const names = unique(panel.bars.map((bar) => bar.name));
  const groups = unique(panel.bars.map((bar) => bar.group));
  const totals = d3.rollup(panel.bars, (bars) => d3.sum(bars, (bar) => bar.value), (bar) => bar.name);
  const { factor, unit } = unitOf(panel.value, [...totals.values()]);
  const room = Math.min(width * 0.42, 24 + 7 * d3.max(names, (name) => name.length));
  const letters = Math.floor((room - 16) / 7);
  const grouped = groups.length > 1 || groups[0] !== "";
  const colours = coloursOf(groups);
  const fill = (bar) => colours.get(bar.group);
  const beyond = 14 + 6.8 * d3.max([...totals.values(), 0], (total) => formatValue(total, panel.value).length);
  const chart = plot(width, {
    height: 48 + 24 * names.length,
    marginTop: 6,
    marginLeft: room,
    marginRight: beyond,
    x: { label: axisLabel(panel.value, unit), labelArrow: "none", domain: [Math.min(0, ...totals.values()) * factor, Math.max(0, ...totals.values()) * factor || 1], ticks: Math.max(2, width / 160), nice: true },
    y: { label: null, domain: names, tickFormat: (name) => shorten(name, letters), tickSize: 0 },
    marks: [
      Plot.gridX({ strokeOpacity: 0.12 }),
      Plot.barX(panel.bars, {
        x: (bar) => bar.value * factor, y: "name", fill, insetTop: 2, insetBottom: 2,
        title: (bar) => [bar.name, bar.group, formatValue(bar.value, panel.value)].filter(Boolean).join("\n"),
        tip: true,
      }),
      Plot.ruleX([0], { strokeOpacity: 0.4 }),
      Plot.text([...totals], {
        x: ([, total]) => total * factor, y: ([name]) => name, dx: 6, textAnchor: "start",
        text: ([, total]) => formatValue(total, panel.value),
      }),
    ],
  });
  const items = groups.map((name) => ({ name: name || "other", colour: colours.get(name) }));
  return grouped ? [chart, legend(items)] : [chart];
}

function note(text) {
  return make("p", { className: "note", textContent: text });
}
