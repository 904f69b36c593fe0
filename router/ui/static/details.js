// All that is known of one turn.

import { bytes, count, el, seconds } from "./dom.js";

const WHERE = {
  here: "the decode replica made what was missing",
  there: "a prefill replica made what was missing",
  copy: "another decode replica handed it over",
};
const WHY = {
  only: "there was no other way",
  policy: "the deployment says so",
  cached: "less than a block was missing",
  sooner: "it was expected to be the soonest",
  objective: "responses that were running were not to be held up",
  unavailable: "no prefill replica could be used",
};

export function details(turn, context) {
  const [where, why] = turn.prefill_choice.split(": ");
  const own = Math.max(0, turn.prompt_tokens - turn.cached_tokens - turn.computed_tokens);
  const facts = [
    ["began", new Date(1000 * turn.began_at).toLocaleTimeString("en-GB")],
    ["outcome", turn.outcome || "running"],
    [
      "prompt",
      `${count(turn.prompt_tokens)} tokens` +
        (own && turn.outcome === "ok" ? `, ${count(own)} of them read by the decoder itself` : ""),
    ],
    ["KV", where ? `${WHERE[where] ?? where}: ${WHY[why] ?? why}` : "nothing of the prompt is shared"],
    ["made by", replica(turn.prefill_replica, context)],
    ["decoded by", replica(turn.decode_replica, context)],
    ["moved", bytes(turn.kv_bytes_transferred)],
    ["expected cached", `${count(turn.predicted_tokens)} tokens`],
    ["waited", seconds(turn.queue_s)],
    ["prefill", seconds(turn.prefill_s)],
    ["KV load", seconds(turn.kv_load_s)],
    ["first token", seconds(turn.time_to_first_token_s)],
    ["whole turn", seconds(turn.took_s)],
    ["taken up again", turn.resumes ? `${count(turn.resumes)} times` : "never"],
    ["own layers", turn.own_layers || "none"],
    ["request", turn.request],
    ["router", turn.router],
  ];
  const shown = ([name, value]) =>
    el("div", { class: value.length > 24 ? "long" : null }, el("dt", {}, name), el("dd", {}, value));
  return el("dl", {}, ...facts.map(shown));
}

const replica = (id, context) => (id ? `${id}, pool ${context.pools.get(id) ?? "unknown: it is gone"}` : "–");
