"use strict";
// Numbers, units and small elements. All text of data becomes text nodes and attributes, never HTML.

const NO_VALUE = "–";
const BYTES = ["B", "kB", "MB", "GB", "TB", "PB"];

/** Make an element; a property that the element has is set, anything else is an attribute. */
function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** Nodes of a sentence; what is between backticks is code. */
function prose(text) {
  const parts = text.split("`");
  if (parts.length % 2 === 0) return [text];
  return parts.map((part, index) => (index % 2 ? make("code", { textContent: part }) : part));
}

/** Make an element of SVG. */
function makeSvg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Four digits that count, and thousands in groups: 1,234,567 · 0.1234 · 1.234e-7. */
function formatNumber(value) {
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return value.toLocaleString("en-US");
  if (size < 1e-3 || size >= 1e15) return value.toExponential(3).replace(/\.?0+e/, "e");
  const digits = Math.max(0, 3 - Math.floor(Math.log10(size)));
  return value.toLocaleString("en-US", { maximumFractionDigits: digits });
}

/**
 * How the values of an axis are written: `factor` times the value, in `unit`. Bytes take the unit
 * of the largest value, so that a whole axis or column has one.
 */
function unitOf(axis, values) {
  if (axis.form === "percent") return { factor: 100, unit: "%" };
  if (axis.form !== "bytes") return { factor: 1, unit: axis.unit };
  const largest = values.reduce((most, value) => (value > most ? value : most), 0);
  const power = Math.min(BYTES.length - 1, Math.floor(Math.log10(Math.max(1, largest)) / 3));
  return { factor: 1000 ** -power, unit: BYTES[power] };
}

/** Write a time in UTC as people read it; other texts stay as they are. */
function formatTime(text) {
  const found = /^(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(\.\d+)?(Z|\+00:00)$/.exec(text);
  return found ? `${found[1]} ${found[2]} UTC` : text;
}

/** Write one value with its unit, such as `12.5 %`; values that are no numbers stay as they are. */
function formatValue(value, axis) {
  if (value === null || value === undefined) return NO_VALUE;
  if (typeof value !== "number") return formatTime(String(value));
  const { factor, unit } = unitOf(axis, [Math.abs(value)]);
  return formatNumber(value * factor) + (unit ? ` ${unit}` : "");
}

/** The name of an axis with its unit. */
function axisLabel(axis, unit) {
  return unit && unit !== axis.name ? `${axis.name} (${unit})` : axis.name;
}

function unique(values) {
  return [...new Set(values)];
}

/** Cut a text that is longer than `length` and mark the cut. */
function shorten(text, length) {
  return text.length > length ? `${text.slice(0, Math.max(1, length - 1))}…` : text;
}
