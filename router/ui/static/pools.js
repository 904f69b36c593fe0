// Pools and their replicas, as the router that answered sees them.

import { tag } from "./bars.js";
import { count, el, keyed, percent, plural, say, set } from "./dom.js";

export function showPools(root, told) {
  keyed(
    root,
    told.pools,
    (pool) => pool.pool,
    makePool,
    (element, pool) => updatePool(element, pool, told.decoders),
  );
}

function makePool(pool) {
  const replicas = el("ul", { class: "replicas", "aria-label": `Replicas of ${pool.pool}` });
  const head = el(
    "div",
    { class: "pool-head" },
    el("h3", {}, pool.pool),
    el("span", { class: "quiet" }),
    el("span", { class: "waiting" }),
  );
  return el("article", { class: "panel pool" }, head, el("p", { class: "tags" }), replicas, el("p", { class: "quiet" }));
}

function updatePool(element, pool, decoders) {
  const [head, tags, replicas, more] = element.children;
  const served = decoders.filter((decoder) => decoder.pool === pool.pool);
  const mode = served.length ? `, mode ${served[0].sharing}` : "";
  say(head.children[1], pool.role === "decode" ? `decode${mode}` : `prefill for ${pool.for.join(", ")}`);
  say(head.children[2], pool.waiting_turns ? `${plural(pool.waiting_turns, "turn")} waiting` : "");
  keyed(
    tags,
    served,
    ({ name }) => name,
    ({ name }) => tag(name),
  );
  tags.hidden = !served.length;
  keyed(replicas, pool.replicas, ({ replica }) => replica, makeReplica, updateReplica);
  say(more, pool.unlisted_replicas ? `and ${plural(pool.unlisted_replicas, "more replica")}` : "");
  more.hidden = !pool.unlisted_replicas;
}

function makeReplica({ replica }) {
  const meter = el("span", { class: "meter", role: "meter", "aria-valuemin": 0, "aria-valuemax": 100 }, el("i"));
  set(meter, "aria-label", `KV blocks held, ${replica}`);
  return el(
    "li",
    {},
    el("span", { class: "state", title: replica }),
    el("span", { class: "queues" }),
    el("span", { class: "kv" }, meter, el("span", { class: "kv-text" })),
  );
}

function updateReplica(element, replica) {
  const [state, queues, kv] = element.children;
  const ails = [
    replica.usable ? "" : `ejected: ${replica.reason}`,
    replica.stalled_s >= 1 ? `no step for ${Math.round(replica.stalled_s)} s` : "",
  ].filter(Boolean);
  const code = state.firstElementChild ?? state.appendChild(el("code", {}, short(replica.replica)));
  const note = code.nextElementSibling ?? (state.append(" "), state.appendChild(el("span", {})));
  say(note, ails.length ? ails.join(", ") : "usable");
  set(note, "class", ails.length ? "" : "unseen");
  set(state, "data-state", ails.length ? "bad" : "good");
  const queued = replica.queued_tokens ? `, ${plural(replica.queued_tokens, "token")} to prefill` : "";
  say(queues, `${count(replica.running)} running, ${count(replica.waiting)} waiting${queued}`);
  const [meter, text] = kv.children;
  const share = replica.blocks_total ? (100 * replica.blocks_used) / replica.blocks_total : 0;
  set(meter, "aria-valuenow", Math.round(share));
  set(meter, "aria-valuetext", `${count(replica.blocks_used)} of ${count(replica.blocks_total)} blocks`);
  meter.firstElementChild.style.width = `${share}%`;
  set(meter, "data-state", share > 95 ? "full" : "");
  say(text, `KV held ${percent(replica.blocks_used, replica.blocks_total)}`);
  set(kv, "title", `${count(replica.blocks_used)} of ${count(replica.blocks_total)} blocks held by turns`);
}

/** Ray's names of replicas are eight random letters and digits. */
export const short = (replica) => (replica.length > 10 ? `…${replica.slice(-8)}` : replica);
