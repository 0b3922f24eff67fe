"use strict";
// What the viewer says of one token: its numbers, both top lists, the legend of the colours.

/** A probability of a list in words, `–` where it is not in the list. */
function formatProbability(value) {
  return value === null ? NO_VALUE : formatShare(value);
}

/** Draw one top list: bars of probability, the sampled token marked, entries of this list alone too. */
function drawList(title, entries, side, other, tail, tailHow) {
  const known = entries.filter((each) => each[side] !== null).sort((a, b) => b[side] - a[side]);
  const shown = known.reduce((sum, each) => sum + each[side], 0);
  const inList = side === "p" ? "inStudent" : "inTeacher";
  const rows = known.map((each) => {
    const marks = [];
    if (each.chosen) marks.push("sampled");
    if (!each[inList]) marks.push("not in this list");
    else if (each[other] === null) marks.push("only here");
    const bar = make("span", { className: "bar", ariaHidden: "true" });
    bar.style.width = `${Math.max(0.5, 100 * each[side])}%`;
    return make("tr", { className: each.chosen ? "sampled" : "" },
      make("td", { className: "entry", title: `id ${each.token.id}` }, bar,
        make("bdi", { className: "entry-text", textContent: labelOf(each.token) }),
        ...(marks.length ? [make("span", { className: "entry-mark", textContent: marks.join(", ") })] : [])),
      make("td", { className: "number", textContent: formatProbability(each[side]) }));
  });
  const rest = Math.max(0, 1 - shown - (Number.isNaN(tail) ? 0 : tail));
  const line = (text, value, how) => make("tr", { className: "rest" },
    make("td", { textContent: text, title: how }), make("td", { className: "number", textContent: formatShare(value) }));
  // Rounding alone leaves some thousandths.
  if (rest > 0.005) rows.push(line("other ids", rest, "Ids that are stored, but not on this page."));
  if (!Number.isNaN(tail)) rows.push(line("tail", tail, tailHow));
  return make("table", { className: "top" }, make("caption", { textContent: title }), make("tbody", {}, ...rows));
}

/** Draw both lists of a position side by side. */
function drawLists(model, sequence, teacher, position) {
  const found = model.lists(sequence, teacher, position), span = model.spanOf(sequence, teacher, position);
  const parts = [drawList("student p", found.entries, "p", "q", found.studentTail,
    "The student's probability of all ids that are not in its stored list.")];
  const listed = !span || found.entries.some((each) => each.q !== null);
  if (found.scored && listed) {
    parts.push(drawList(`teacher q: ${model.teachers[teacher]}`, found.entries, "q", "p", found.teacherTail,
      "The teacher's probability of all ids that it did not score."));
  }
  const notes = [];
  if (span) notes.push(spanText(model, sequence, span), ...(listed ? [] : ["The teacher's list is at another token of the span, or not stored."]));
  if (!found.scored) notes.push(sequence.teachers.length ? "The teacher did not score this position." : "No teacher scored this response.");
  if (!found.counted) notes.push("The token does not count in a loss.");
  return make("div", {}, make("div", { className: "lists" }, ...parts),
    ...notes.map((text) => make("p", { className: "note", textContent: text })));
}

/** A span in words: the tokens of both sides and their log-probs. */
function spanText(model, sequence, span) {
  const own = Array.from({ length: span.last - span.first + 1 }, (_, i) => model.tokenAt(sequence, span.first + i));
  const side = (tokens, letter, value) => `${tokens.map(labelOf).join(" + ")} with log ${letter} ${value.toFixed(model.digits)}`;
  return `Span: ${side(own, "p", span.p)}; the teacher has ${side(span.tokens, "q", span.q)} nats.`;
}

/** Draw the numbers of a position, the chosen measure first in weight. */
function drawNumbers(model, sequence, teacher, position, chosen) {
  return make("dl", { className: "numbers-of-token" }, ...model.measures.flatMap((measure) => {
    const value = model.values(measure.id, sequence, teacher)[position];
    const className = measure.id === chosen.id ? "chosen" : "";
    return [make("dt", { textContent: measure.name, title: measure.how, className }),
      make("dd", { textContent: formatMeasure(model, measure, value), className })];
  }));
}

/** Draw the whole panel of a token; `others` are [{title, sequence, teacher}] at the same position. */
function drawDetail(root, model, { sequence, teacher, position, measure, others, note }) {
  if (position === null) {
    root.replaceChildren(make("p", { className: "note",
      textContent: "Point at a token, tap it, or use the arrow keys: this place then shows its numbers and both top lists." }));
    return;
  }
  const token = model.tokenAt(sequence, position);
  const rawNote = token.bytes ? ` A part of the bytes of ${joinedAt(model, sequence, position)}.` : "";
  root.replaceChildren(
    make("h3", {}, make("bdi", { className: "token-text", textContent: labelOf(token) }),
      make("span", { className: "soft", textContent: ` position ${position} of 0 to ${sequence.length - 1}, id ${token.id}.${rawNote}` })),
    drawLists(model, sequence, teacher, position),
    ...others.flatMap((other) => [make("h4", { textContent: other.title }),
      drawLists(model, other.sequence, other.teacher, position)]),
    ...(note ? [make("p", { className: "note", textContent: note })] : []),
    drawNumbers(model, sequence, teacher, position, measure));
}

/** What a screen reader says of a position. */
function spoken(model, sequence, teacher, position, measure) {
  const value = model.values(measure.id, sequence, teacher)[position];
  const { entries } = model.lists(sequence, teacher, position);
  const best = (side) => entries.filter((each) => each[side] !== null).sort((a, b) => b[side] - a[side])[0];
  const first = (name, entry, side) => (entry ? `${name} prefers ${labelOf(entry.token)}, ${formatShare(entry[side])}. ` : "");
  return `${labelOf(model.tokenAt(sequence, position))}, position ${position}. ${measure.name}: ${formatMeasure(model, measure, value)}. `
    + first("Student", best("p"), "p") + first("Teacher", best("q"), "q");
}

/** Draw the scale of colours with its numbers. */
function drawLegend(root, measure) {
  const { edges } = measure;
  const write = (value) => (measure.unit ? String(value) : `${formatNumber(value * 100)} %`);
  const cells = [];
  for (let bin = 0; edges.length && bin <= edges.length; bin++) {
    const value = bin === 0 ? edges[0] - 1 : edges[bin - 1];
    const text = bin === 0 ? `< ${write(edges[0])}` : `≥ ${write(edges[bin - 1])}`;
    cells.push(make("li", {}, make("span", { className: `swatch ${colourClass(measure, value)}`, ariaHidden: "true" }), text));
  }
  root.replaceChildren(
    make("p", { className: "how", textContent: measure.how }),
    make("ul", { className: "scale", ariaLabel: `Colours of ${measure.name}` },
      ...(measure.unit ? [make("li", { textContent: `${measure.unit}:` })] : []), ...cells,
      make("li", {}, make("span", { className: "swatch none", ariaHidden: "true" }), "no value"),
      make("li", {}, make("span", { className: "swatch bad", ariaHidden: "true", textContent: "ab" }), "beyond the threshold")));
}
