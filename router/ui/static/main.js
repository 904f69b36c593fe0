// Asks the router once a second, as long as somebody looks, and shows what it tells.

import { colour, legend, parts } from "./bars.js";
import { count, el, keyed, percent, plural, say, set } from "./dom.js";
import { showLanes } from "./lanes.js";
import { showPools } from "./pools.js";
import { Store } from "./store.js";

const EVERY_MS = 1000;
const ANSWER_MS = 8000;
const SLOWEST_MS = 8000;
const LANES = 40;

const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const store = new Store();
// Kept here and nowhere else: the key is gone when the page is.
let key = "";
let paused = false;
let failures = 0;
let all = false;
let playground = null;
let wake = () => {};

const headers = () => (key ? { authorization: `Bearer ${key}` } : {});

async function ask() {
  const answer = await fetch(`ui/data?known=${store.known()}`, { headers: headers(), signal: AbortSignal.timeout(ANSWER_MS) });
  if (answer.ok) {
    store.take(await answer.json());
    return show();
  }
  const text = (await answer.json().catch(() => null))?.error?.message ?? `the router answered ${answer.status}`;
  if (answer.status === 401) return askForKey(text);
  throw new Error(text);
}

async function keepAsking() {
  for (;;) {
    if (!paused && !document.hidden && page.key.hidden) {
      try {
        await ask();
        failures = 0;
      } catch (error) {
        failures += 1;
        if (failures > 1) status("bad", `no answer, trying again: ${error.message}`);
      }
    }
    await new Promise((resolve) => {
      wake = resolve;
      setTimeout(resolve, Math.min(SLOWEST_MS, EVERY_MS * 2 ** Math.max(0, failures - 1)));
    });
  }
}

function status(state, text) {
  set(page.status, "data-state", state);
  say(page.status, text);
}

function askForKey(text) {
  say(page["key-error"], key ? text : "");
  set(page["key-input"], "aria-invalid", key ? "true" : null);
  key = "";
  // The next key may be another tenant's.
  store.forget();
  playground?.remove();
  playground = null;
  page.key.hidden = false;
  page.shown.hidden = page.forget.hidden = true;
  status("wait", "an API key is needed");
  page["key-input"].focus();
}

function show() {
  const { told } = store;
  const lanes = store.lanes();
  colour(told.decoders.map(({ name }) => name));
  page.shown.hidden = false;
  page.forget.hidden = !key;
  if (!paused) status("good", "live");
  const whose = told.tenant ? `, tenant ${told.tenant}` : "";
  const named = told.deployment === "prefillshare" ? "" : `${told.deployment}: `;
  say(page.facts, `${named}${told.base.model}, ${plural(told.decoders.length, "decoder")}${whose}`);
  document.title = named ? `${told.deployment} · prefillshare` : "prefillshare";
  showFigures(lanes.flatMap((lane) => lane.turns));
  showPools(page.pools, told);
  showSessions(lanes);
  showNotes(told);
  if (told.ui === "full" && !playground) openPlayground();
}

function showFigures(turns) {
  const sum = (of) => turns.reduce((all, turn) => all + of(turn), 0);
  const running = turns.filter((turn) => !turn.outcome).length;
  const failed = turns.filter(({ outcome }) => !["", "ok", "cancelled"].includes(outcome)).length;
  const prompts = sum((turn) => turn.prompt_tokens);
  const cached = sum((turn) => parts(turn).cached);
  const figures = [
    ["found cached", percent(cached, prompts), `of ${plural(prompts, "prompt token")}`],
    ["computed", count(sum((turn) => turn.computed_tokens)), "prompt tokens"],
    ["generated", count(sum((turn) => turn.completion_tokens)), "tokens"],
    ["turns", count(turns.length), failed ? `${count(failed)} of them failed` : "taken lately"],
    ["running", count(running), running === 1 ? "turn" : "turns"],
  ];
  const make = ([name]) => el("div", {}, el("dt", {}, name), el("dd", {}, el("b", {}), el("span", { class: "quiet" })));
  keyed(
    page.figures,
    figures,
    ([name]) => name,
    make,
    (element, [, value, of]) => {
      const [number, unit] = element.lastElementChild.children;
      say(number, value);
      say(unit, of);
    },
  );
}

function showSessions(lanes) {
  const wanted = page.filter.value.trim().toLowerCase();
  const names = (lane) => [lane.session, ...lane.turns.flatMap((turn) => [turn.decoder, turn.request])];
  const matches = (lane) => names(lane).some((name) => name.toLowerCase().includes(wanted));
  let found = wanted ? lanes.filter(matches) : lanes;
  const rest = all ? 0 : Math.max(0, found.length - LANES);
  if (rest) found = found.slice(0, LANES);
  // Whoever reads or types in the lanes is not to lose the place: they stay where they are meanwhile, and new ones come last.
  // Who types a filter looks for others, wherever the pointer rests.
  const looks = document.activeElement === page.filter;
  const isRead = !looks && (page.lanes.matches(":hover") || page.lanes.contains(document.activeElement));
  if (isRead) found = inTheOrderShown(found);
  showLanes(page.lanes, found, { now: store.told.now, pools: store.pools(), isRead });
  page.empty.hidden = found.length > 0;
  say(page.empty, wanted ? "No session and no decoder has such a name." : page.empty.dataset.text);
  page.more.hidden = !rest;
  say(page.more, `Show ${plural(rest, "more lane")}`);
}

function inTheOrderShown(lanes) {
  const place = new Map([...page.lanes.children].map((element, number) => [element.dataset.key, number]));
  const at = (lane) => place.get(lane.key) ?? place.size;
  return [...lanes].sort((a, b) => at(a) - at(b));
}

function showNotes(told) {
  const { routers } = told.router;
  const several =
    `Turns of ${count(store.routers.size)} of ${count(routers)} routers, put together from their answers; ` +
    "queues and KV as one of them sees them.";
  const notes = [
    routers > 1 ? several : "Turns are those that this router has taken lately. It keeps them in memory, without their text.",
    `Tokens are found in whole blocks of ${count(told.block_tokens)}. ` +
      "What the base has computed of an answer after its turn counts as cached in the next one.",
    "A lane without a session's name holds calls that continue each other: each prompt begins with all of an earlier one.",
    "KV made: there, by a prefill replica; here, by the decode replica itself; copy, handed over by another decode replica.",
  ];
  keyed(
    page.notes,
    notes,
    (note) => note,
    (note) => el("p", {}, note),
  );
}

async function openPlayground() {
  playground = el("aside", { class: "panel playground", "aria-labelledby": "playground-title" });
  page.columns.append(playground);
  const { start } = await import("./playground.js");
  start(playground, { store, headers, ask });
}

page["key-form"].addEventListener("submit", (event) => {
  event.preventDefault();
  key = page["key-input"].value.trim();
  page["key-input"].value = "";
  page.key.hidden = true;
  status("wait", "connecting");
  wake();
});

page.forget.addEventListener("click", () => location.reload());

page.pause.addEventListener("click", () => {
  paused = !paused;
  set(page.pause, "aria-pressed", paused);
  status("wait", paused ? "paused" : "connecting");
  wake();
});

page.filter.addEventListener("input", () => store.told && showSessions(store.lanes()));
page.more.addEventListener("click", () => {
  all = true;
  showSessions(store.lanes());
});
document.addEventListener("visibilitychange", () => wake());
page.empty.dataset.text = page.empty.textContent;
page.legend.append(...legend());
keepAsking();
