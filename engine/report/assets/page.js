"use strict";
// The page: heading, summary, sections, themes; `refresh` draws new data in the same place.

const THEMES = ["system", "light", "dark"];
const STATES = { good: ["✓", "good"], neutral: ["•", ""], warning: ["!", "warning"] };
const kept = new Map(); // panel id -> {text, figure, choices}: what is drawn already
let viewerText = "";

const report = JSON.parse(document.getElementById("report-json").textContent);

function byId(id) {
  return document.getElementById(id);
}

/** Draw the page of `data`; panels whose data did not change stay as they are. */
function refresh(data) {
  document.title = data.title;
  byId("title").textContent = data.title;
  byId("facts").textContent = `Made ${formatTime(data.made)} with logitcask ${data.version}`;
  byId("foot").textContent = document.documentElement.dataset.live
    ? "This page asks its own server on this machine for news, and fetches nothing else."
    : "Everything on this page is in this file; it fetches nothing.";
  byId("runs").replaceChildren(...(data.runs.length > 1 ? data.runs.map((name, number) =>
    make("li", {}, make("span", { className: "dot", style: `background:${colour(number)}`, ariaHidden: "true" }), make("span", { textContent: name }))) : []));
  const sections = data.sections.map((section) => drawSection(section, data));
  if (data.viewer) sections.splice(Math.min(1, sections.length), 0, drawViewer(data));
  if (data.summary.length) sections.unshift(drawSummary(data));
  place(byId("content"), sections);
  byId("nav").replaceChildren(...sections.map((section) =>
    make("a", { href: `#${section.id}`, textContent: section.querySelector("h2").textContent })));
  markSection();
  if (!document.querySelector(".chart")) document.documentElement.dataset.drawn = "all";
}

/** Put `wanted` into `parent` in this order; what is there already is not moved without need. */
function place(parent, wanted) {
  for (const child of [...parent.children]) if (!wanted.includes(child)) child.remove();
  wanted.forEach((child, index) => {
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null);
  });
}

/** The section with this id, with its heading; the one that is there already, if it is. */
function sectionOf(id, title) {
  const found = byId(id) ?? make("section", { id, "aria-labelledby": `head-${id}` }, make("h2", { id: `head-${id}`, tabIndex: -1 }));
  found.querySelector("h2").textContent = title;
  return found;
}

function drawSummary(data) {
  const section = sectionOf("summary", "Summary");
  const list = make("ul", { className: "summary" }, ...data.summary.map((sentence) => {
    const [sign, name] = STATES[sentence.state];
    return make("li", { className: sentence.state },
      make("span", { className: "sign", ariaHidden: "true", textContent: sign }),
      make("span", {}, ...(name ? [make("span", { className: "unseen", textContent: `${name}: ` })] : []), ...prose(sentence.text)));
  }));
  place(section, [section.querySelector("h2"), list]);
  return section;
}

function drawSection(data, whole) {
  const section = sectionOf(data.id, data.title);
  const grid = section.querySelector(".grid") ?? make("div", { className: "grid" });
  place(grid, data.panels.map((panel) => panelOf(panel, whole)));
  fillRows(grid);
  const absent = data.absent.map((each) => make("li", {}, make("strong", { textContent: `${each.title}: ` }), make("span", {}, ...prose(each.why))));
  const parts = [section.querySelector("h2"), grid];
  if (absent.length) parts.push(make("div", { className: "absent" }, make("h3", { textContent: "Not shown" }), make("ul", {}, ...absent)));
  place(section, parts);
  return section;
}

/** A panel without another one at its side takes the whole row. */
function fillRows(grid) {
  let left = null;
  for (const figure of [...grid.children, null]) {
    figure?.classList.remove("alone");
    if (figure && !figure.classList.contains("wide")) left = left ? null : figure;
    else {
      left?.classList.add("alone");
      left = null;
    }
  }
}

function panelOf(panel, whole) {
  const text = JSON.stringify([panel, whole.runs]);
  const old = kept.get(panel.id);
  if (old?.text === text) return old.figure;
  const choices = old?.choices ?? {};
  const figure = drawPanel(panel, whole, choices);
  if (old?.figure.querySelector("details")?.open) figure.querySelector("details").open = true;
  // The old drawing stays until the new one is there, so that nothing jumps.
  const before = old?.figure.querySelector(".chart");
  if (before) figure.querySelector(".chart").replaceChildren(...before.childNodes);
  kept.set(panel.id, { text, figure, choices });
  return figure;
}

function drawViewer(data) {
  const section = sectionOf("tokens", "Tokens");
  const root = section.querySelector(".viewer") ?? make("div", { className: "viewer" });
  place(section, [section.querySelector("h2"), root]);
  const text = JSON.stringify(data.viewer);
  if (text !== viewerText) {
    viewerText = text;
    // After this turn: the viewer measures its place, which is in the page by then.
    queueMicrotask(() => startViewer(root, data.viewer));
  }
  return section;
}

/** Mark the link of the section that is at the top of the window. */
function markSection() {
  const top = byId("nav").getBoundingClientRect().bottom + 24;
  const sections = [...byId("content").children];
  const current = sections.findLast((section) => section.getBoundingClientRect().top <= top) ?? sections[0];
  for (const link of byId("nav").children) {
    if (link.hash === `#${current?.id}`) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "system") + 1) % THEMES.length];
  root.dataset.theme = next;
  byId("theme").textContent = `Theme: ${next}`;
});

// In a frame of a notebook a link to a fragment would load the notebook into the frame.
byId("nav").addEventListener("click", (event) => {
  if (location.protocol !== "about:" || !event.target.hash) return;
  event.preventDefault();
  byId(event.target.hash.slice(1)).scrollIntoView();
});

document.addEventListener("scroll", markSection, { passive: true });
refresh(report);
