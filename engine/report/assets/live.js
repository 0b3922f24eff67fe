"use strict";
// A live page: asks its own server for news, redraws what moved, and says how fresh it is.

const [LIVE_URL, SHOWN] = document.documentElement.dataset.live.split("#"); // SHOWN: ETag of this page
const ASK_MS = 2000; // while the run goes on
const REST_MS = 10000; // after its end, or while the server does not answer
const LIMIT_MS = 60000; // of one answer
const LIVE_STATES = {
  running: ["live", "Live"],
  finished: ["ended", "Run has ended"],
  stopped: ["lost", "Run has stopped before its end"],
};

const fresh = { etag: SHOWN, moved: Date.now(), answered: Date.now(), state: "running", error: "" };
const light = make("span", { className: "light", ariaHidden: "true" });
// The state alone is read aloud when it changes, the age would be every second.
const stateText = make("span", { role: "status" });
const ageText = make("span", { className: "age" });
byId("theme").before(make("p", { id: "freshness", className: "live" }, light, stateText, ageText));

/** 3 s, 5 min or 2 h. */
function age(since) {
  const seconds = Math.max(0, Math.round((Date.now() - since) / 1000));
  if (seconds < 100) return `${seconds} s`;
  return seconds < 6000 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

function showState() {
  const [name, text] = fresh.error ? ["lost", fresh.error] : LIVE_STATES[fresh.state];
  light.className = `light ${name}`;
  if (stateText.textContent !== text) stateText.textContent = text;
  ageText.textContent = fresh.error ? `, last answer ${age(fresh.answered)} ago` : `, news ${age(fresh.moved)} ago`;
}

/** Ask once. An answer 304 has no body: nothing moved. */
async function ask() {
  let answer;
  try {
    const headers = { "If-None-Match": `"${fresh.etag}"` };
    answer = await fetch(LIVE_URL, { headers, cache: "no-store", signal: AbortSignal.timeout(LIMIT_MS) });
    if (answer.status === 200) {
      const data = await answer.json();
      fresh.moved = Date.now();
      fresh.etag = answer.headers.get("ETag").replaceAll('"', "");
      refresh(data);
    }
  } catch (error) {
    // What fetch throws; an error of drawing goes to the console.
    if (!(error instanceof TypeError && !answer) && !(error instanceof DOMException)) throw error;
    fresh.error = "Connection lost";
    return;
  }
  fresh.answered = Date.now();
  if (answer.status === 503) fresh.error = `Cannot read the run: ${(await answer.json()).error}`;
  else if (answer.status === 403) fresh.error = "The server has a new address: open the one that it printed";
  else fresh.error = "";
  fresh.state = answer.headers.get("Logitcask-State") ?? fresh.state;
}

async function follow() {
  await ask();
  showState();
  setTimeout(follow, fresh.error || fresh.state !== "running" ? REST_MS : ASK_MS);
}

showState();
setInterval(showState, 1000);
follow();
