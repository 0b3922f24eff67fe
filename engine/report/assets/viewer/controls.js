"use strict";
// The parts of the viewer that do not change with the chosen response: controls, filters, help.

const KEYS = [
  ["← →", "token before or after"],
  ["↑ ↓", "line above or below"],
  ["Home End", "first or last token"],
  ["n p", "next or previous bad token"],
  ["j k", "next or previous response"],
  ["?", "this help"],
];

/** A control with its name in front; `set` takes its value when it changes. */
function labelled(name, control, set) {
  control.addEventListener("change", () => set(control.value));
  return make("label", { className: "control" }, make("span", { textContent: name }), control);
}

function choice(options, value) {
  const found = make("select", {}, ...options.map(([id, text]) => make("option", { value: id, textContent: text })));
  found.value = value;
  return found;
}

function numberField(value, attributes = {}) {
  return make("input", { type: "number", step: "any", value: value ?? "", ...attributes });
}

/** Measure, teacher and threshold; `changed` is called after the state has changed. */
function drawControls(root, model, state, changed) {
  const threshold = numberField(state.threshold);
  const parts = [
    labelled("Colour tokens by", choice(model.measures.map((each) => [each.id, each.unit ? `${each.name}, ${each.unit}` : each.name]), state.measure.id), (id) => {
      state.measure = model.measures.find((each) => each.id === id);
      state.threshold = state.measure.bad;
      threshold.value = state.threshold;
      changed();
    }),
  ];
  if (model.teachers.length > 1) {
    parts.push(labelled("Teacher", choice(model.teachers.map((name, i) => [i, name]), state.teacher), (value) => {
      state.teacher = Number(value);
      changed();
    }));
  }
  parts.push(labelled("Bad beyond", threshold, (value) => {
    state.threshold = value === "" ? state.measure.bad : Number(value);
    changed();
  }));
  root.replaceChildren(...parts);
}

/** Search, order and filters of the list. */
function drawFilters(root, model, state, changed) {
  const { filters, range } = state;
  const distinct = (pick) => unique(model.sequences.map(pick));
  const set = (target, key, read = (value) => value) => (value) => {
    target[key] = read(value);
    changed();
  };
  const optional = (value) => (value === "" ? null : Number(value));
  const search = make("input", { type: "search", placeholder: "Search text", value: filters.text, ariaLabel: "Search prompts and responses" });
  search.addEventListener("input", () => { filters.text = search.value; changed(); });
  const between = (name, target, low, high, read = optional) => make("fieldset", {}, make("legend", { textContent: name }),
    labelled("from", numberField(Number.isFinite(target[low]) ? target[low] : null), set(target, low, read)),
    labelled("to", numberField(Number.isFinite(target[high]) ? target[high] : null), set(target, high, read)));
  const fields = [];
  if (distinct((each) => each.reward).some((reward) => reward !== null)) {
    fields.push(labelled("Correctness", choice([["all", "all"], ["correct", "correct (reward 1)"], ["incorrect", "incorrect"]], filters.correct), set(filters, "correct")));
  }
  const versions = distinct((each) => each.versions[0]).sort((a, b) => a - b);
  if (versions.length > 1) {
    fields.push(labelled("Version of the student", choice([["all", "all"], ...versions.map((each) => [each, each])], filters.version), set(filters, "version")));
  }
  if (model.sources.length > 1) {
    fields.push(labelled("Run", choice([["all", "all"], ...model.sources.map((name, i) => [i, name])], filters.source), set(filters, "source")));
  }
  if (distinct((each) => each.finish).length > 1) {
    fields.push(labelled("End", choice([["all", "all"], ["stop", "stopped"], ["length", "cut off"]], filters.finish), set(filters, "finish")));
  }
  fields.push(
    between("Length, tokens", filters, "shortest", "longest"),
    between("Worst value", filters, "lowest", "highest"),
    make("fieldset", {}, make("legend", { textContent: "Positions that count here" }),
      labelled("from", numberField(range.first || null, { min: 0 }), set(range, "first", (value) => Math.max(0, Math.floor(Number(value))))),
      labelled("to", numberField(Number.isFinite(range.last) ? range.last : null, { min: 0 }), set(range, "last", (value) => (value === "" ? Infinity : Number(value))))));
  root.replaceChildren(search,
    labelled("Order", choice(ORDERS.map(([id, text]) => [id, text]), state.order), set(state, "order")),
    make("details", { className: "filters", open: state.filtersOpen ?? false }, make("summary", { textContent: "Filters" }), ...fields));
  root.querySelector("details").addEventListener("toggle", (event) => { state.filtersOpen = event.target.open; });
}

function drawHelp() {
  const close = make("button", { type: "button", className: "button", textContent: "Close" });
  const dialog = make("dialog", { className: "keys", ariaLabel: "Keys of the token viewer" },
    make("h3", { textContent: "Keys, while a token or the list has the focus" }),
    make("dl", {}, ...KEYS.flatMap(([keys, text]) => [make("dt", {}, ...keys.split(" ").map((key) => make("kbd", { textContent: key }))), make("dd", { textContent: text })])),
    close);
  close.addEventListener("click", () => dialog.close());
  return dialog;
}
