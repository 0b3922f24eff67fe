"use strict";
// The token viewer: its state, and how list, text and details follow each other.

const viewers = new WeakMap(); // root -> the viewer that is in it

/** Show `viewer` in `root`; where a viewer is there already, its choices stay. */
async function startViewer(root, viewer) {
  const old = viewers.get(root);
  const turn = (root.turn = (root.turn ?? 0) + 1);
  if (!old) root.replaceChildren(make("p", { className: "note", textContent: "Reading the responses …" }));
  const model = await unpackViewer(viewer);
  // New data would take the field away that is being filled in.
  while (old && root.contains(document.activeElement) && document.activeElement.matches("input")) {
    await new Promise((done) => { root.addEventListener("focusout", () => setTimeout(done), { once: true }); });
  }
  if (turn !== root.turn) return; // newer data came meanwhile
  // A growing store has other worst responses: the one that is being read stays until another is chosen.
  const reading = old?.state.position !== null && old?.state.sequence?.key;
  if (reading && !model.sequences.some((each) => each.key === reading)) return;
  const focus = focusable(root).indexOf(document.activeElement);
  viewers.set(root, makeViewer(root, model, old?.state));
  focusable(root)[focus]?.focus({ preventScroll: true });
  root.dataset.ready = "true";
}

/** The parts that can have the focus: the same ones as long as the state is the same. */
function focusable(root) {
  return [...root.querySelectorAll("select, summary, button, [tabindex='0']")];
}

function firstState(model) {
  const measure = model.measures[0];
  return {
    measure, threshold: measure?.bad ?? 0, teacher: 0, order: measure?.of_teacher ? "worst" : "number",
    filters: { correct: "all", version: "all", source: "all", finish: "all", text: "", shortest: null, longest: null, lowest: null, highest: null },
    range: { first: 0, last: Infinity }, sequence: null, position: null, other: "",
  };
}

/** The state of an earlier viewer for a new model: what is no longer there falls back. */
function stateFor(model, before) {
  const state = firstState(model);
  if (!before) return state;
  const measure = model.measures.find((each) => each.id === before.measure?.id);
  Object.assign(state, before, { measure: measure ?? state.measure, threshold: measure ? before.threshold : state.threshold });
  state.teacher = Math.min(before.teacher, Math.max(0, model.teachers.length - 1));
  state.sequence = model.sequences.find((each) => each.key === before.sequence?.key) ?? null;
  if (!state.sequence || before.position >= state.sequence.length) state.position = null;
  return state;
}

function makeViewer(root, model, before) {
  const state = stateFor(model, before);
  const parts = {
    controls: make("div", { className: "viewer-controls" }), legend: make("div", { className: "viewer-legend" }),
    filters: make("div", { className: "viewer-filters" }), count: make("p", { className: "note" }),
    list: make("ul", { className: "responses", role: "listbox", tabIndex: 0, ariaLabel: "Responses" }),
    head: make("div", { className: "viewer-head" }), panes: make("div", { className: "panes" }),
    detail: make("aside", { className: "viewer-detail", tabIndex: 0, ariaLabel: "Details of the token" }),
    tip: make("div", { className: "tip", hidden: true }), live: make("p", { className: "unseen", role: "status" }), help: drawHelp(),
  };
  let responses = [];
  let panes = []; // [{sequence, teacher, title, text, root, position}]

  const teacherOf = (sequence) => (sequence.teachers.includes(state.teacher) ? state.teacher : sequence.teachers[0] ?? 0);
  const valuesOf = (pane) => model.values(state.measure.id, pane.sequence, pane.teacher);

  function paint() {
    for (const pane of panes) pane.text.paint(state.measure, valuesOf(pane), state.threshold);
  }

  /** All that a changed measure, teacher, filter or order changes. */
  function changed() {
    drawLegend(parts.legend, state.measure);
    parts.tip.hidden = true;
    responses = chosenResponses(model, state);
    drawResponses(parts.list, model, responses, state);
    parts.count.textContent = `${formatNumber(responses.length)} of ${formatNumber(model.sequences.length)} responses`;
    if (!responses.includes(state.sequence) && responses.length) choose(responses[0], null);
    else if (state.sequence && panes[0]?.teacher !== teacherOf(state.sequence)) choose(state.sequence, state.position, true);
    markResponse();
    paint();
    showDetail(state.position);
  }

  function markResponse() {
    for (const item of parts.list.children) item.setAttribute("aria-selected", String(item.sequence === state.sequence));
    const item = state.sequence && document.getElementById(`response-${state.sequence.index}`);
    if (!item) return parts.list.removeAttribute("aria-activedescendant");
    parts.list.setAttribute("aria-activedescendant", item.id);
    // Not scrollIntoView, which would scroll the page too.
    const { offsetTop, offsetHeight } = item, { scrollTop, clientHeight } = parts.list;
    if (offsetTop < scrollTop) parts.list.scrollTop = offsetTop;
    else if (offsetTop + offsetHeight > scrollTop + clientHeight) parts.list.scrollTop = offsetTop + offsetHeight - clientHeight;
    return undefined;
  }

  /** Show a response; position null = none is chosen yet. */
  function choose(sequence, position, quiet = position === null) {
    if (sequence !== state.sequence) state.other = "";
    state.sequence = sequence;
    state.position = position;
    drawHead();
    drawPanes();
    markResponse();
    move(position, { quiet });
  }

  /** Other teachers of the response, and other responses to its prompt. */
  function othersOf(sequence) {
    const own = teacherOf(sequence), prompt = model.prompts[sequence.prompt].id;
    const teachers = sequence.teachers.filter((each) => each !== own).map((each) => ({ id: `teacher ${each}`, title: `teacher ${model.teachers[each]}`, sequence, teacher: each }));
    const same = model.sequences.filter((each) => each !== sequence && model.prompts[each.prompt].id === prompt)
      .map((each) => ({ id: each.key, title: `response ${each.number}: ${describe(model, each, { withSource: true })}`, sequence: each, teacher: teacherOf(each) }));
    return [...teachers, ...same];
  }

  function drawHead() {
    const { sequence } = state, others = othersOf(sequence);
    const button = (text, title, act) => {
      const found = make("button", { type: "button", className: "button", textContent: text, title });
      found.addEventListener("click", act);
      return found;
    };
    const parallel = labelled("Side by side with", choice([["", "nothing"], ...others.map((each) => [each.id, each.title])], state.other), (value) => {
      state.other = value;
      drawPanes();
      move(state.position, { quiet: true });
    });
    parts.head.replaceChildren(
      make("div", {}, make("h3", {}, make("bdi", { textContent: `Prompt ${model.prompts[sequence.prompt].id}, response ${sequence.number}` })),
        make("p", { className: "note", textContent: describe(model, sequence, { withSource: true }) })),
      make("div", { className: "viewer-buttons" },
        button("‹ bad", "Previous bad token (p)", () => jump(-1)), button("bad ›", "Next bad token (n)", () => jump(1)),
        button("‹ response", "Previous response (k)", () => turn(-1)), button("response ›", "Next response (j)", () => turn(1)),
        button("Keys", "Keys (?)", () => parts.help.showModal())),
      ...(others.length ? [parallel] : []));
  }

  function drawPanes() {
    const other = othersOf(state.sequence).find((each) => each.id === state.other);
    const first = { sequence: state.sequence, teacher: teacherOf(state.sequence), title: "" };
    const shown = other ? [{ ...first, title: other.sequence === first.sequence ? `teacher ${model.teachers[first.teacher]}` : `response ${first.sequence.number}: ${describe(model, first.sequence, { withSource: true })}` }, other] : [first];
    panes = shown.map((each, number) => {
      const body = make("div", { id: `pane-${number}`, className: "pane-body" });
      const pane = { ...each, root: make("div", { className: "pane" }, ...(each.title ? [make("p", { className: "pane-title", textContent: each.title })] : []), body) };
      pane.text = drawTokens(body, model, each.sequence, {
        name: `Tokens of response ${each.sequence.number}${each.title ? `, ${each.title}` : ""}`, from: state.range,
        onMove: (position) => { pane.text.box.focus({ preventScroll: true }); move(position, { pane: number }); },
        onPoint: (position, span) => point(position, span, pane),
      });
      return pane;
    });
    const equal = commonLength();
    panes.forEach((pane) => { if (panes.length > 1 && equal < pane.text.spans.length) pane.text.spans[equal].dataset.parts = "true"; });
    parts.panes.replaceChildren(...panes.map((pane) => pane.root));
    parts.panes.dataset.count = panes.length;
    paint();
  }

  /** Tokens at the beginning that both panes have in common; the position after them has one past too. */
  function commonLength() {
    const [first, second] = panes.map((pane) => pane.sequence);
    if (!second) return Infinity;
    let i = 0;
    while (i < first.length && i < second.length && model.tokenNumber(first, i) === model.tokenNumber(second, i)) i++;
    return first === second ? Infinity : i;
  }

  function showDetail(position, pane = panes[0]) {
    if (!pane || !state.measure) return;
    const equal = commonLength();
    const aligned = position !== null && position <= equal;
    const others = panes.filter((each) => each !== pane && aligned && position < each.sequence.length);
    const note = panes.length > 1 && position !== null && !aligned ? `The responses part at token ${equal}: from there on the same number is no longer the same place.` : "";
    drawDetail(parts.detail, model, { sequence: pane.sequence, teacher: pane.teacher, position, measure: state.measure, others, note });
  }

  function point(position, span, pane) {
    const equal = commonLength();
    for (const each of panes) each.text.point(position !== null && (each === pane || position <= equal) ? position : null);
    parts.tip.hidden = position === null;
    showDetail(position ?? state.position, position === null ? panes[0] : pane);
    if (position === null) return;
    parts.tip.textContent = `${labelOf(model.tokenAt(pane.sequence, position))}  ${formatMeasure(model, state.measure, valuesOf(pane)[position])}`;
    const rect = span.getClientRects()[0], tip = parts.tip.getBoundingClientRect();
    parts.tip.style.left = `${Math.max(4, Math.min(rect.left, innerWidth - tip.width - 4))}px`;
    parts.tip.style.top = `${rect.top - tip.height - 6 < 4 ? rect.bottom + 6 : rect.top - tip.height - 6}px`;
  }

  /** Choose a token of a pane, and its twin in the other one. */
  function move(position, { pane = 0, quiet = false } = {}) {
    const equal = commonLength();
    panes.forEach((each, number) => {
      const place = position !== null && position < each.sequence.length && (number === pane || position <= equal) ? position : null;
      each.position = place;
      each.text.mark(place);
      if (place !== null) each.text.reveal(place, !quiet);
    });
    if (pane === 0 || position <= equal) state.position = position;
    showDetail(position, panes[pane]);
    if (quiet || position === null) return;
    parts.live.textContent = spoken(model, panes[pane].sequence, panes[pane].teacher, position, state.measure);
    remember();
  }

  let timer = 0;
  /** Keep the place in the address, so that it can be copied; a frame of a notebook has none. */
  function remember() {
    clearTimeout(timer);
    if (location.protocol === "about:") return;
    timer = setTimeout(() => history.replaceState(null, "", `#${placeOf(state)}`), 300);
  }

  function jump(way) {
    const values = valuesOf(panes[0]), { range } = state;
    let i = (state.position ?? (way > 0 ? -1 : values.length)) + way;
    while (i >= 0 && i < values.length && !(i >= range.first && i <= range.last && isBad(state.measure, values[i], state.threshold))) i += way;
    if (i >= 0 && i < values.length) move(i);
    else parts.live.textContent = way > 0 ? "No bad token after this one." : "No bad token before this one.";
  }

  function turn(way) {
    const next = responses[responses.indexOf(state.sequence) + way];
    if (next) choose(next, 0);
  }

  function keydown(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input, select, textarea, summary, button")) return;
    const pane = panes.findIndex((each) => each.text.box === event.target);
    const acts = { n: () => jump(1), p: () => jump(-1), j: () => turnWithFocus(1), k: () => turnWithFocus(-1), "?": () => parts.help.showModal() };
    if (event.target === parts.list) Object.assign(acts, { ArrowDown: () => turn(1), ArrowUp: () => turn(-1), Enter: () => panes[0].text.box.focus() });
    if (pane >= 0) {
      for (const key of ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"]) {
        acts[key] = () => move(panes[pane].text.step(panes[pane].position, key), { pane });
      }
    }
    if (!acts[event.key]) return;
    event.preventDefault();
    acts[event.key]();
  }
  function turnWithFocus(way) {
    const inText = document.activeElement !== parts.list;
    turn(way);
    if (inText) panes[0].text.box.focus({ preventScroll: true });
  }

  parts.list.addEventListener("click", (event) => {
    const item = event.target.closest("li");
    if (item) choose(item.sequence, null);
  });

  const opened = openedBy(model, location.hash);
  drawControls(parts.controls, model, state, changed);
  drawFilters(parts.filters, model, state, changed);
  const inside = make("div", {},
    make("div", { className: "viewer-top" }, parts.controls, parts.legend),
    make("div", { className: "viewer-body" },
      make("div", { className: "viewer-side" }, parts.filters, parts.count, parts.list),
      make("div", { className: "viewer-reading" }, make("div", { className: "viewer-main" }, parts.head, parts.panes), parts.detail)),
    ...(model.notes.length ? [make("ul", { className: "viewer-notes" }, ...model.notes.map((text) => make("li", { textContent: `${text}.` })))] : []),
    parts.tip, parts.live, parts.help);
  inside.addEventListener("keydown", keydown);
  root.replaceChildren(inside);
  changed();
  if (opened && !before) show(opened);
  else if (before && state.sequence) choose(state.sequence, state.position, true);

  function show({ sequence, position }) {
    choose(sequence, position);
    root.scrollIntoView({ block: "start" });
    panes[0].text.box.focus({ preventScroll: true });
  }
  return { state, model, show };
}

/** `seq=12&pos=40&run=1`: a response as the store counts it, a token, and the number of the run. */
function placeOf({ sequence, position }) {
  return `seq=${sequence.number}&pos=${position ?? 0}${sequence.source ? `&run=${sequence.source}` : ""}`;
}

function openedBy(model, hash) {
  const place = new URLSearchParams(hash.slice(1));
  if (!place.has("seq")) return null;
  const sequence = model.sequences.find((each) => each.number === Number(place.get("seq")) && each.source === Number(place.get("run") ?? 0));
  if (!sequence) return null;
  return { sequence, position: Math.max(0, Math.min(sequence.length - 1, Number(place.get("pos")) || 0)) };
}

addEventListener("hashchange", () => {
  for (const root of document.querySelectorAll(".viewer")) {
    const found = viewers.get(root), opened = found && openedBy(found.model, location.hash);
    if (opened) found.show(opened);
  }
});
