"use strict";
// A response as tokens: what a token looks like as text, its colour, and moving among tokens.

const BLOCK = 200; // tokens of a block, about: the browser lays out only blocks that are in sight
const NAMED = { "\n": "⏎\n", "\t": "⇥\t", "\u007f": "␡", "\u00ad": "⟨U+00AD⟩" };
// Controls, directions, selectors without an emoji, joiners, separators, lone surrogates: no font shows them, or they change others.
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b\u200c\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0e\ufeff\uffa0\ufff9-\ufffb\u{e0000}-\u{e0fff}]|(?<!\p{Extended_Pictographic})[\u200d\ufe0f]|\p{Surrogate}/gu;

/** Text in which every letter can be seen; a token that begins with a mark gets a circle below it. */
function visible(text) {
  const shown = text.replace(HIDDEN, (letter) => {
    const code = letter.codePointAt(0);
    if (letter in NAMED) return NAMED[letter];
    if (code < 32) return String.fromCodePoint(0x2400 + code);
    return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
  return /^\p{Mark}/u.test(shown) ? `◌${shown}` : shown;
}

/** The text of a token in a line of its own: spaces can be counted, bytes are hex digits. */
function labelOf(token) {
  if (token.bytes) return `⟨${token.bytes}⟩`;
  return visible(token.text).replace(/\n/g, "").replace(/ /g, "␣").replace(/\t/g, "") || "(no text)";
}

function textOf(token) {
  return token.bytes ? `⟨${token.bytes}⟩` : visible(token.text);
}

/** The text that a token of bytes makes together with such tokens before and after it. */
function joinedAt(model, sequence, position) {
  const bytesAt = (i) => (i >= 0 && i < sequence.length ? model.tokenAt(sequence, i).bytes : "");
  let first = position, last = position;
  while (bytesAt(first - 1)) first--;
  while (bytesAt(last + 1)) last++;
  const digits = Array.from({ length: last - first + 1 }, (_, i) => bytesAt(first + i)).join(" ").split(" ");
  return visible(new TextDecoder().decode(Uint8Array.from(digits, (each) => parseInt(each, 16))));
}

/** The class of the colour of a value: s0 to s6 towards the worst end, d0 to d8 around 0. */
function colourClass(measure, value) {
  if (Number.isNaN(value)) return "none";
  let bin = 0;
  while (bin < measure.edges.length && value >= measure.edges[bin]) bin++;
  if (measure.worst === "both") return `d${bin}`;
  return `s${measure.worst === "low" ? measure.edges.length - bin : bin}`;
}

/** Whether a value is beyond the threshold, at the end that is bad. */
function isBad(measure, value, threshold) {
  if (Number.isNaN(value)) return false;
  if (measure.worst === "low") return value < threshold;
  return (measure.worst === "both" ? Math.abs(value) : value) > threshold;
}

/** How bad a value is, for sorting: larger is worse. */
function badness(measure, value) {
  return measure.worst === "low" ? -value : measure.worst === "both" ? Math.abs(value) : value;
}

/** A value of a measure with its unit, in as many digits as are stored. */
function formatMeasure(model, measure, value) {
  if (value === undefined || Number.isNaN(value)) return "no value";
  if (measure.unit) return `${value.toFixed(model.digits)} ${measure.unit}`;
  return formatShare(value);
}

/** A share as percent with three digits that count. */
function formatShare(value) {
  const percent = value * 100;
  if (percent >= 99.95) return percent >= 99.995 ? "100 %" : `${percent.toFixed(2)} %`;
  if (percent >= 10) return `${percent.toFixed(1)} %`;
  if (percent >= 0.01) return `${percent.toFixed(2)} %`;
  if (percent >= 0.001) return `${percent.toFixed(3)} %`;
  return percent > 0 ? `${percent.toExponential(0)} %` : "0 %";
}

/**
 * Draw prompt and response into `root`. The result has `paint(measure, values, threshold)`,
 * `mark(position)`, `point(position)` for what the pointer is at, and `move(position, key)`.
 */
function drawTokens(root, model, sequence, { name, from, onMove, onPoint }) {
  const prompt = model.prompts[sequence.prompt];
  const spans = [];
  const before = make("div", { className: "prompt", role: "note", ariaLabel: "Prompt" },
    prompt.left_out ? `… ${formatNumber(prompt.left_out)} earlier tokens of the prompt are left out\n` : "",
    model.promptTokens(sequence.prompt).map(textOf).join(""));
  const box = make("div", { className: "tokens", role: "listbox", tabIndex: 0, ariaLabel: name });
  box.setAttribute("aria-orientation", "horizontal");
  let block = null;
  for (let position = 0; position < sequence.length; position++) {
    const full = block && (block.childElementCount >= 2 * BLOCK
      || (block.childElementCount >= BLOCK && spans[position - 1].textContent.endsWith("\n")));
    if (!block || full) {
      block = make("div", { className: "block", role: "group", ariaLabel: `from token ${position}` });
      block.dataset.start = position;
      box.append(block);
    }
    const span = make("span", { role: "option", textContent: textOf(model.tokenAt(sequence, position)) });
    span.position = position;
    spans.push(span);
    block.append(span);
  }
  if (sequence.length <= BLOCK) box.classList.add("short");
  root.replaceChildren(before, box);

  const placeUnder = (event) => event.target.closest?.("[role=option]")?.position;
  box.addEventListener("pointerover", (event) => {
    const position = placeUnder(event);
    if (position !== undefined && event.pointerType !== "touch") onPoint(position, spans[position]);
  });
  box.addEventListener("pointerleave", () => onPoint(null));
  box.addEventListener("click", (event) => {
    const position = placeUnder(event);
    if (position !== undefined) onMove(position);
  });

  let marked = null, pointed = null;
  function mark(position) {
    if (marked !== null) {
      spans[marked].removeAttribute("aria-selected");
      spans[marked].removeAttribute("id");
      spans[marked].classList.remove("here");
    }
    marked = position;
    if (position === null) return box.removeAttribute("aria-activedescendant");
    const span = spans[position];
    span.id = `${box.id || root.id}-token`;
    span.setAttribute("aria-selected", "true");
    span.classList.add("here");
    return box.setAttribute("aria-activedescendant", span.id);
  }
  function point(position) {
    if (pointed !== null) spans[pointed].classList.remove("pointed");
    pointed = position;
    if (position !== null) spans[position]?.classList.add("pointed");
    if (position !== null && !spans[position]) pointed = null;
  }
  function paint(measure, values, threshold) {
    spans.forEach((span, i) => {
      const inside = i >= from.first && i <= from.last;
      span.className = colourClass(measure, values[i])
        + (inside && isBad(measure, values[i], threshold) ? " bad" : "")
        + (i === marked ? " here" : "");
    });
  }
  /** Scroll the token into its pane, and the page too if `page`, as little as needed. */
  function reveal(position, page) {
    const span = spans[position].getBoundingClientRect(), pane = root.getBoundingClientRect();
    if (span.top < pane.top || span.bottom > pane.bottom) root.scrollTop += span.top - pane.top - root.clientHeight / 3;
    if (page) spans[position].scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  return { box, spans, mark, point, paint, reveal, step: (position, key) => stepFrom(spans, position, key) };
}

/** The position after an arrow key; up and down go to the nearest token of the next line. */
function stepFrom(spans, position, key) {
  const last = spans.length - 1;
  if (position === null) return 0;
  if (key === "ArrowLeft") return Math.max(0, position - 1);
  if (key === "ArrowRight") return Math.min(last, position + 1);
  if (key === "Home") return 0;
  if (key === "End") return last;
  const way = key === "ArrowUp" ? -1 : 1;
  const boxOf = (i) => spans[i].getClientRects()[0] ?? spans[i].getBoundingClientRect();
  const start = boxOf(position), middle = start.left + start.width / 2;
  let line = null, best = position, nearest = Infinity;
  for (let i = position + way; i >= 0 && i <= last; i += way) {
    const rect = boxOf(i);
    if (Math.abs(rect.top - start.top) < start.height / 2) continue;
    line ??= rect.top;
    if (Math.abs(rect.top - line) > rect.height / 2) break;
    const distance = Math.abs(rect.left + rect.width / 2 - middle);
    if (distance < nearest) [best, nearest] = [i, distance];
  }
  return best;
}
