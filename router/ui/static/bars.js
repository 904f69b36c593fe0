// A turn's tokens as a bar. Colour says whose turn it is, the pattern what became of the tokens; both stand beside it in words.

import { count, el, set } from "./dom.js";

const COLOURS = 8;
const decoders = [];

/** To be called with the names of all decoders, in the deployment's order. Those that are no longer served keep theirs. */
export function colour(names) {
  for (const name of names) if (!decoders.includes(name)) decoders.push(name);
}

export function colourOf(decoder) {
  colour([decoder]);
  return `d${decoders.indexOf(decoder) % COLOURS}`;
}

export function tag(decoder) {
  return el("span", { class: `tag ${colourOf(decoder)}` }, decoder);
}

/** A turn's tokens: what was found, what was made, and prompt tokens of which nothing is known yet. A turn that was taken up
    again has computed some tokens twice, which a bar does not show. */
export function parts(turn) {
  const cached = Math.min(turn.cached_tokens, turn.prompt_tokens);
  const computed = Math.min(turn.computed_tokens, turn.prompt_tokens - cached);
  const isKnown = turn.prefill_replica || turn.completion_tokens || turn.outcome;
  return { cached, computed, generated: turn.completion_tokens, pending: isKnown ? 0 : turn.prompt_tokens - cached - computed };
}

export const length = (turn) => turn.prompt_tokens + turn.completion_tokens;

const KINDS = ["cached", "computed", "pending", "generated"];

export function makeBar() {
  return el("div", { class: "bar", role: "img" }, ...KINDS.map((kind) => el("i", { class: kind })));
}

/** `whole`: tokens that a bar of full length would have. */
export function showBar(bar, turn, whole) {
  const shares = parts(turn);
  set(bar, "class", `bar ${colourOf(turn.decoder)}${turn.outcome ? "" : " running"}`);
  set(bar, "aria-label", shares.pending ? `${count(shares.pending)} prompt tokens, not begun` : words(turn));
  KINDS.forEach((kind, number) => {
    bar.children[number].style.width = `${(100 * shares[kind]) / Math.max(1, whole)}%`;
  });
}

export function words(turn) {
  const { cached, computed, generated } = parts(turn);
  return `${count(cached)} cached, ${count(computed)} computed, ${count(generated)} generated`;
}

/** The turns of a lane side by side, as an overview; it adds nothing to what the lane says in words. */
export function showStrip(strip, turns) {
  const whole = turns.reduce((sum, turn) => sum + length(turn), 0);
  strip.replaceChildren(
    ...turns.map((turn) => {
      const bar = makeBar();
      bar.removeAttribute("role");
      showBar(bar, turn, length(turn));
      bar.removeAttribute("aria-label");
      bar.style.flexGrow = length(turn) / Math.max(1, whole);
      return bar;
    }),
  );
}

export function legend() {
  const kinds = [
    ["cached", "cached", "found, and not computed again"],
    ["computed", "computed", "made for this turn"],
    ["generated", "generated", "the answer"],
  ];
  return kinds.map(([kind, name, meaning]) =>
    el(
      "li",
      {},
      el("span", { class: "swatch", "aria-hidden": "true" }, el("i", { class: kind })),
      el("b", {}, name),
      ` ${meaning}`,
    ),
  );
}
