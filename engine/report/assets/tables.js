"use strict";
// Tables: those that are panels, and the ones below charts that hold the same numbers.

const FIRST_ROWS = 12;
const LONG = 40; // letters without a space
const NO_NUMBERS = ["NaN", "Infinity", "-Infinity"]; // as page.py writes them
const MOST_POINTS = 200;

/** A table of text and numbers that sorts by a click on the head of a column. */
function drawTable(panel, report, width, choices) {
  const units = panel.columns.map((column, index) =>
    unitOf(column, panel.rows.map((row) => Math.abs(row[index])).filter(Number.isFinite)));
  // A column of numbers may have gaps and what JSON has no number for; one with any text is text.
  const numeric = panel.columns.map((_, index) => panel.rows.every((row) =>
    row[index] === null || typeof row[index] === "number" || NO_NUMBERS.includes(row[index])));
  const body = make("tbody");
  const heads = panel.columns.map((column, index) => make("th",
    { scope: "col", className: numeric[index] ? "number" : "" },
    make("button", { type: "button", textContent: axisLabel(column, numeric[index] ? units[index].unit : column.unit), onclick: () => sort(index) })));
  const table = make("table", { ariaLabel: panel.title }, make("thead", {}, make("tr", {}, ...heads)), body);
  const more = make("button", { type: "button", className: "button", onclick: () => { choices.all = true; fill(); } });

  function sort(index) {
    const down = choices.column === index ? !choices.down : numeric[index];
    Object.assign(choices, { column: index, down });
    fill();
  }

  function fill() {
    const order = d3.range(panel.rows.length);
    if (choices.column !== undefined) {
      const sign = choices.down ? -1 : 1;
      order.sort((a, b) => sign * compare(panel.rows[a][choices.column], panel.rows[b][choices.column], sign) || a - b);
    }
    const shown = choices.all || printing || order.length <= FIRST_ROWS + 6 ? order : order.slice(0, FIRST_ROWS);
    body.replaceChildren(...shown.map((row) => make("tr", {}, ...panel.rows[row].map(cell))));
    heads.forEach((head, index) => {
      head.ariaSort = choices.column !== index ? "none" : choices.down ? "descending" : "ascending";
    });
    more.hidden = shown.length === order.length;
    more.textContent = `Show all ${order.length} rows`;
  }

  function cell(value, index) {
    if (value === null) return make("td", { className: numeric[index] ? "number" : "", textContent: NO_VALUE });
    if (numeric[index]) {
      const text = typeof value === "number" ? formatNumber(value * units[index].factor) : value;
      return make("td", { className: "number", textContent: text });
    }
    const text = formatValue(value, panel.columns[index]);
    // Digests and paths: cut by the style, so that a copy takes the whole.
    // What differs between paths is at their end.
    const long = text.length > LONG && !/\s/.test(text.slice(0, LONG));
    const dir = text.includes("/") ? "rtl" : "ltr";
    return long ? make("td", {}, make("span", { className: "long", title: text, dir }, make("bdi", { dir: "ltr", textContent: text }))) : make("td", { className: text.length <= 24 ? "short" : "words", textContent: text });
  }

  fill();
  return [scrolling(table, panel.title), more];
}

/** Order of two cells; cells without a value come last in both directions. */
function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null) ? sign * ((a === null) - (b === null)) : 0;
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

/** A box that scrolls sideways instead of the page; the keyboard reaches it. */
function scrolling(table, name) {
  return make("div", { className: "table-scroll", tabIndex: 0, role: "region", ariaLabel: `${name}, table` }, table);
}

/** The numbers of a chart as columns and rows, for readers who do not see it. */
const NUMBERS = {
  lines(panel, report) {
    const looks = looksOf(panel, report);
    const places = unique(panel.series.flatMap((series) => series.x)).sort((a, b) => a - b);
    const step = Math.ceil(places.length / MOST_POINTS);
    const values = panel.series.map((series) => new Map(series.x.map((place, index) => [place, series.y[index]])));
    const rows = places.filter((_, index) => index % step === 0)
      .map((place) => [place, ...values.map((each) => each.get(place) ?? null)]);
    const columns = [panel.x, ...looks.map((look) => ({ ...panel.y, name: look.name }))];
    return { columns, rows, note: step > 1 ? `Each ${step}th of ${places.length} points.` : "" };
  },
  heat(panel) {
    const columns = [panel.y, ...panel.xs.map((name) => ({ ...panel.value, name }))];
    return { columns, rows: panel.values.map((row, index) => [panel.ys[index], ...row]), note: `Columns: ${panel.x.name}.` };
  },
  bars(panel) {
    const text = (name) => ({ name, unit: "", form: "" });
    return { columns: [text("name"), text("group"), panel.value], rows: panel.bars.map((bar) => [bar.name, bar.group, bar.value]), note: "" };
  },
  timeline(panel) {
    const axis = (name, unit = "") => ({ name, unit, form: "" });
    const columns = [axis("lane"), axis("group"), axis("start", "s"), axis("end", "s"), axis("label")];
    return { columns, rows: panel.stretches.map((each) => [each.lane, each.group, each.start, each.end, each.label]), note: "" };
  },
};

/** The same numbers below a chart, made when they are opened. */
function numbersOf(panel, report) {
  const inside = make("div");
  const details = make("details", { className: "numbers" }, make("summary", { textContent: "Table of the numbers" }), inside);
  details.addEventListener("toggle", () => {
    if (!details.open || inside.childElementCount) return;
    const found = NUMBERS[panel.kind](panel, report);
    inside.append(...(found.note ? [note(found.note)] : []),
      ...drawTable({ title: panel.title, ...found }, report, 0, {}));
  });
  return details;
}
