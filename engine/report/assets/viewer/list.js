"use strict";
// The list of responses: statistics of each, filters, orders.

const CORRECT = 1; // reward of a correct response

const ORDERS = [
  ["worst", "worst token first", (a, b) => b.stats.badness - a.stats.badness],
  ["mean", "worst mean first", (a, b) => b.stats.meanBadness - a.stats.meanBadness],
  ["bad", "most bad tokens first", (a, b) => b.stats.bad - a.stats.bad],
  ["reward", "lowest reward first", (a, b) => (a.reward ?? 2) - (b.reward ?? 2)],
  ["longest", "longest first", (a, b) => b.length - a.length],
  ["shortest", "shortest first", (a, b) => a.length - b.length],
  ["version", "latest version first", (a, b) => b.versions[0] - a.versions[0]],
  ["prompt", "by prompt", (a, b) => a.prompt - b.prompt],
  ["number", "as in the store", (a, b) => a.source - b.source || a.number - b.number],
];

/** Worst value, mean and number of bad tokens of a response within a range of positions. */
function statsOf(model, sequence, { measure, teacher, threshold, range }) {
  const own = sequence.teachers.includes(teacher) || !sequence.teachers.length ? teacher : sequence.teachers[0];
  const values = model.values(measure.id, sequence, own);
  const stats = { worst: NaN, at: null, badness: -Infinity, mean: NaN, meanBadness: -Infinity, bad: 0 };
  let sum = 0, count = 0;
  const last = Math.min(values.length - 1, range.last);
  for (let i = range.first; i <= last; i++) {
    if (Number.isNaN(values[i])) continue;
    const size = badness(measure, values[i]);
    sum += values[i];
    count += 1;
    if (isBad(measure, values[i], threshold)) stats.bad += 1;
    if (size > stats.badness) Object.assign(stats, { badness: size, worst: values[i], at: i });
  }
  if (count) stats.mean = sum / count;
  if (count) stats.meanBadness = badness(measure, stats.mean);
  return stats;
}

function responseText(model, sequence) {
  if (sequence.text === undefined) {
    const response = Array.from({ length: sequence.length }, (_, i) => model.tokenAt(sequence, i).text).join("");
    const prompt = model.promptTokens(sequence.prompt).map((token) => token.text).join("");
    sequence.text = `${model.prompts[sequence.prompt].id}\n${prompt}${response}`.toLowerCase();
  }
  return sequence.text;
}

/** The responses that pass all filters, in the chosen order. */
function chosenResponses(model, state) {
  const { filters } = state;
  const within = (value, low, high) => (low === null || value >= low) && (high === null || value <= high);
  const wanted = filters.text.trim().toLowerCase();
  const found = model.sequences.filter((each) => {
    each.stats = statsOf(model, each, state);
    return (filters.correct === "all" || (each.reward !== null && (each.reward >= CORRECT) === (filters.correct === "correct")))
      && (filters.version === "all" || each.versions[0] === Number(filters.version))
      && (filters.source === "all" || each.source === Number(filters.source))
      && (filters.finish === "all" || each.finish === filters.finish)
      && within(each.length, filters.shortest, filters.longest)
      && ((filters.lowest === null && filters.highest === null) || within(each.stats.worst, filters.lowest, filters.highest))
      && (!wanted || responseText(model, each).includes(wanted));
  });
  const order = ORDERS.find(([id]) => id === state.order)[2];
  return found.sort((a, b) => order(a, b) || a.index - b.index);
}

/** One line about a response: what it is of, and how it went. */
function describe(model, sequence, { withSource = false } = {}) {
  const [start, end] = sequence.versions;
  const parts = withSource && model.sources.length > 1 ? [model.sources[sequence.source]] : [];
  parts.push(`version ${start === end ? start : `${start}–${end}`}`);
  if (sequence.reward !== null) parts.push(`reward ${formatNumber(sequence.reward)}`);
  parts.push(`${formatNumber(sequence.length)} tokens`);
  if (sequence.finish === "length") parts.push("cut off");
  return parts.join(" · ");
}

/** Draw the responses as options of a list; the chosen one is marked. */
function drawResponses(root, model, responses, state) {
  root.replaceChildren(...responses.map((each) => {
    const mark = each.reward === null ? "" : each.reward >= CORRECT ? "✓" : "✗";
    const prompt = model.prompts[each.prompt];
    const start = shorten(model.promptTokens(each.prompt).slice(-40).map((token) => visible(token.text).replace(/\s+/g, " ")).join("").trim(), 60);
    const item = make("li", { role: "option", id: `response-${each.index}`, className: "response" },
      make("span", { className: "response-head" },
        make("bdi", { className: "response-prompt", textContent: start || prompt.id }),
        make("span", { className: `response-mark ${mark === "✓" ? "good" : "warning"}`, ariaHidden: "true", textContent: mark })),
      make("span", { className: "response-facts", textContent: describe(model, each, { withSource: true }) }),
      make("span", { className: "response-facts", textContent: `worst ${formatMeasure(model, state.measure, each.stats.worst)} · ${formatNumber(each.stats.bad)} bad` }));
    item.title = `prompt ${prompt.id}, response ${each.number}`;
    item.sequence = each;
    return item;
  }));
}
