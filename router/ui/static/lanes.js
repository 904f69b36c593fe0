// Sessions as lanes: a row for each turn, all on one scale, so that what a turn found cached stands under what made it.

import { length, makeBar, showBar, showStrip, tag } from "./bars.js";
import { ago, count, el, keyed, percent, plural, say, seconds, set } from "./dom.js";
import { details } from "./details.js";
import { short } from "./pools.js";

const OPEN_LANES = 3;
const ROWS = 12;
const COLUMNS = ["turn", "decoder", "", "cached", "computed", "generated", "KV made", "decoded by", "first token"];

export function showLanes(root, lanes, context) {
  keyed(
    root,
    lanes,
    ({ key }) => key,
    (lane) => makeLane(lane, root.children.length < OPEN_LANES),
    (element, lane) => updateLane(element, lane, context),
  );
}

function makeLane(lane, open) {
  const name = lane.session
    ? el("b", { class: "name", title: lane.session }, lane.session)
    : el(
        "span",
        { class: "name", title: "calls without a session, each of which continues another" },
        lane.turns[0].request.slice(0, 17),
      );
  const summary = el(
    "summary",
    {},
    name,
    el("span", { class: "quiet size" }),
    el("span", { class: "strip", "aria-hidden": "true" }),
    el("span", { class: "share" }),
    el("span", { class: "quiet when" }),
  );
  const head = el("tr", { role: "row" }, ...COLUMNS.map((text) => el("th", { role: "columnheader", scope: "col" }, text)));
  const table = el("table", { role: "table" }, el("thead", { role: "rowgroup" }, head), el("tbody", { role: "rowgroup" }));
  set(table, "aria-label", lane.session ? `Turns of session ${lane.session}` : "Calls without a session");
  const earlier = el("button", { type: "button", class: "earlier", hidden: "" });
  const made = el("li", { class: "panel lane" }, el("details", { open: open ? "" : null }, summary, earlier, table));
  earlier.addEventListener("click", () => {
    made.dataset.whole = "yes";
    made.update();
    made.querySelector("tbody button").focus();
  });
  made.querySelector("details").addEventListener("toggle", () => made.update());
  return made;
}

function updateLane(element, lane, context) {
  element.update = () => updateLane(element, lane, context);
  const { turns } = lane;
  const [summary, earlier, table] = element.firstElementChild.children;
  const [, size, strip, share, when] = summary.children;
  const names = new Set(turns.map((turn) => turn.decoder));
  const last = turns.at(-1);
  say(size, `${plural(turns.length, lane.session ? "turn" : "call")}, ${plural(names.size, "decoder")}`);
  const cached = turns.reduce((sum, turn) => sum + turn.cached_tokens, 0);
  const prompts = turns.reduce((sum, turn) => sum + turn.prompt_tokens, 0);
  say(share, `${percent(cached, prompts)} cached`);
  say(when, last.outcome ? ago(context.now - last.began_at - last.took_s) : "running");
  const seen = turns
    .slice(-ROWS)
    .map((turn) => [turn.router, turn.number, turn.outcome, length(turn)])
    .join();
  if (strip.dataset.seen !== seen) {
    strip.dataset.seen = seen;
    showStrip(strip, turns.slice(-ROWS));
  }
  if (!element.firstElementChild.open) return;
  const rows = element.dataset.whole ? turns : turns.slice(-ROWS);
  const whole = Math.max(...rows.map(length));
  const hidden = turns.length - rows.length;
  earlier.hidden = !hidden;
  say(earlier, `Show ${plural(hidden, "earlier turn")}`);
  say(table.querySelectorAll("th")[2], `tokens, 0 to ${count(whole)}`);
  const numbered = rows.map((turn, place) => ({ turn, number: hidden + place + 1 }));
  const body = table.tBodies[0];
  keyed(
    body,
    numbered,
    ({ turn }) => `${turn.router} ${turn.number}`,
    makeRow,
    (row, item) => updateRow(row, item, whole, context),
  );
}

function makeRow({ turn, number }) {
  const button = el("button", { type: "button", class: "number", "aria-expanded": "false" }, count(number));
  const cell = (kind, ...children) => el("td", { role: "cell", class: kind }, ...children);
  const figure = (kind) => cell(`figure ${kind}`, el("span", {}), el("span", { class: "unit" }, ` ${kind}`));
  const row = el(
    "tr",
    { role: "row" },
    cell("turn", button),
    cell("decoder", tag(turn.decoder)),
    cell("tokens", makeBar()),
    figure("cached"),
    figure("computed"),
    figure("generated"),
    cell("made", el("span", { class: "unit" }, "KV "), el("span", {})),
    cell("ran", el("span", { class: "unit" }, "decoded by "), el("span", {})),
    cell("first", el("span", {}), el("span", { class: "unit" }, " to the first token")),
  );
  button.addEventListener("click", () => {
    const opened = row.classList.toggle("opened");
    set(button, "aria-expanded", opened);
    row.update();
  });
  return row;
}

function updateRow(row, { turn, number }, whole, context, again = false) {
  row.update = () => updateRow(row, { turn, number }, whole, context, true);
  // What has not changed is left alone: somebody may be reading it, or copying it.
  if (!again && row.turn === turn && row.whole === whole) return;
  Object.assign(row, { turn, whole });
  const [first, , tokens, cached, computed, generated, made, ran, ttft] = row.cells;
  set(first.firstElementChild, "aria-label", `Turn ${number}, ${turn.decoder}: details`);
  showBar(tokens.firstElementChild, turn, whole);
  say(cached.firstElementChild, count(turn.cached_tokens));
  say(computed.firstElementChild, count(turn.computed_tokens));
  say(generated.firstElementChild, count(turn.completion_tokens));
  const where = turn.prefill_choice.split(":")[0];
  const by = where && where !== "here" ? turn.prefill_replica : "";
  if (made.dataset.seen !== where + by) {
    made.dataset.seen = where + by;
    made.lastElementChild.replaceChildren(where || "–", by ? el("code", { title: named(by, context) }, short(by)) : "");
  }
  if (ran.dataset.seen !== turn.decode_replica) {
    ran.dataset.seen = turn.decode_replica;
    const by = turn.decode_replica;
    ran.lastElementChild.replaceChildren(by ? el("code", { title: named(by, context) }, short(by)) : "–");
  }
  const [state, text] = end(turn);
  say(ttft.firstElementChild, text);
  ttft.lastElementChild.hidden = state !== "ok";
  set(row, "data-outcome", state);
  showDetails(row, turn, context);
}

/** The details stand in a second line of the row's own grid: a row of their own would be a turn to screen readers. */
function showDetails(row, turn, context) {
  const shown = row.cells[9];
  if (!row.classList.contains("opened")) shown?.remove();
  else if (!shown) row.append(el("td", { role: "cell", class: "details" }, details(turn, context)));
  else shown.replaceChildren(details(turn, context));
}

const named = (replica, context) => `${replica} of pool ${context.pools.get(replica) ?? "that it has left"}`;

/** How a turn goes or went, and what stands for it in the last column. The details name the error of one that failed. */
function end(turn) {
  if (turn.outcome === "cancelled") return ["cancelled", "cancelled"];
  if (turn.outcome && turn.outcome !== "ok") return ["failed", "failed"];
  return turn.time_to_first_token_s ? ["ok", seconds(turn.time_to_first_token_s)] : ["waiting", "waiting"];
}
