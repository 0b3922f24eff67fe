"use strict";
// One panel: its heading, the sentence how to read it, the chart, the numbers.

const DRAW = { lines: drawLines, heat: drawHeat, bars: drawBars, timeline: drawTimeline, table: drawTable };
const SLICE = 12; // milliseconds of drawing before the browser may answer to the reader

const waiting = new Set();
let scheduled = false;

// A chart is drawn when its place has a width, and again when that changes.
const places = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const width = Math.floor(target.clientWidth);
    if (width && width !== target.drawnWidth) schedule(target);
  }
});

function schedule(place) {
  waiting.add(place);
  document.documentElement.dataset.drawn = "";
  if (scheduled) return;
  scheduled = true;
  setTimeout(drawWaiting);
}

/** Draw panels in the order of the page, in short pieces of work. */
function drawWaiting() {
  scheduled = false;
  const until = performance.now() + SLICE;
  for (const place of waiting) {
    waiting.delete(place);
    if (place.isConnected) place.draw();
    if (waiting.size && performance.now() > until) {
      scheduled = true;
      setTimeout(drawWaiting);
      return;
    }
  }
  document.documentElement.dataset.drawn = "all";
}

// Paper gets charts of its own size, and whole timelines.
const PAPER = 680;
let printing = false;

window.addEventListener("beforeprint", () => {
  printing = true;
  waiting.clear();
  for (const place of document.querySelectorAll(".chart")) place.draw(PAPER);
});
window.addEventListener("afterprint", () => {
  printing = false;
  for (const place of document.querySelectorAll(".chart")) place.draw();
});

/** Name a chart as one picture; the names that Plot gives to its parts are not for readers. */
function nameChart(chart, title) {
  for (const part of chart.querySelectorAll("[aria-label]")) {
    part.dataset.mark = part.getAttribute("aria-label");
    part.removeAttribute("aria-label");
  }
  chart.setAttribute("role", "img");
  chart.setAttribute("aria-label", `${title}. The numbers are in the table below the chart.`);
}

/**
 * Make the figure of a panel. It draws itself once it is in the page. `choices` is what the reader
 * chose in it (order of a table, zoom of a timeline), which the next figure may take over.
 */
function drawPanel(panel, report, choices = {}) {
  const title = `title-${panel.id}`;
  const place = make("div", { className: `chart chart-${panel.kind}` });
  const head = make("figcaption", {},
    make("h3", { id: title, textContent: panel.title }),
    make("p", { className: "how" }, ...prose(panel.how)));
  const wide = ["heat", "timeline"].includes(panel.kind) || (panel.columns ?? []).length > 3;
  const figure = make("figure", { className: `panel panel-${panel.kind} ${wide ? "wide" : ""}`, id: `panel-${panel.id}`, "aria-labelledby": title }, head, place);
  place.draw = (given = place.clientWidth) => {
    const width = Math.max(240, Math.floor(given));
    place.drawnWidth = Math.floor(place.clientWidth);
    place.replaceChildren(...DRAW[panel.kind](panel, report, width, choices));
    if (panel.kind !== "table") nameChart(place.querySelector("svg:not([aria-hidden])"), panel.title);
  };
  if (panel.kind !== "table") figure.append(numbersOf(panel, report));
  places.observe(place);
  return figure;
}
