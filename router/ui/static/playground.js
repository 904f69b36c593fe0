// Two decoders talk in turn over one session, by the same HTTP API that every client uses. Below each answer stands what the
// turn computed.

import { makeBar, showBar, tag, words, length } from "./bars.js";
import { count, el, say, set } from "./dom.js";

/** Ties the calls to one session; a router that does not know the header serves them by their history alone. */
const SESSION_HEADER = "x-prefillshare-session";
const CONTEXT =
  "You run the booking service of a ferry line. It has four ferries between the mainland and three islands. A ferry carries " +
  "up to 220 passengers and 40 cars. The service keeps one count of free seats per departure and holds a place for ten " +
  "minutes while somebody pays. Residents of the islands pay half; children under six pay nothing.";
const FIRST = "Who pays nothing, and who pays half?";
const LOOKS = 8;

export function start(root, { store, headers, ask }) {
  const base = store.told.base.name;
  const names = store.told.decoders.map(({ name }) => name);
  const preferred = [...names.filter((name) => name !== base), base];
  let talk = null;

  const context = el("textarea", { id: "play-context", rows: 4 });
  const said = el("ol", { class: "talk", role: "log", "aria-label": "Conversation" });
  const message = el("textarea", { id: "play-message", rows: 3 });
  const speakers = [0, 1].map((number) => speaker(number, names, preferred[number] ?? names[0]));
  const limit = el("input", { id: "play-limit", type: "number", min: 1, max: 4096, value: 96 });
  const send = el("button", { type: "submit", class: "primary" });
  const stop = el("button", { type: "button", hidden: "" }, "Stop");
  const again = el("button", { type: "button" }, "New session");
  const trouble = el("p", { class: "error", role: "alert" });
  const form = el(
    "form",
    {},
    field("Message", message),
    el(
      "fieldset",
      { class: "speakers" },
      el("legend", {}, "Who answers; they take turns"),
      ...speakers.map(({ line }) => line),
    ),
    el("div", { class: "row" }, field("At most, tokens", limit), send, stop, again),
    trouble,
  );
  const opening = el(
    "details",
    { open: "" },
    el("summary", {}, "Context"),
    field("What all decoders know (system message)", context),
  );
  root.append(el("h2", { id: "playground-title" }, "Playground"), opening, said, form);

  const next = () => speakers.find(({ radio }) => radio.checked) ?? speakers[0];
  const name = () => say(send, `Ask ${next().select.value}`);
  form.addEventListener("change", name);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!talk.running) turn();
  });
  message.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  stop.addEventListener("click", () => talk.running?.abort());
  again.addEventListener("click", begin);

  function begin() {
    talk?.running?.abort();
    talk = { session: `ui-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`, messages: [], bars: [], running: null };
    said.replaceChildren();
    say(trouble, "");
    context.value = context.value || CONTEXT;
    message.value = FIRST;
    context.readOnly = false;
    opening.open = true;
    speakers[0].radio.checked = true;
    busy(false);
    name();
  }

  function busy(is) {
    stop.hidden = !is;
    send.disabled = is;
    set(said, "aria-busy", is);
  }

  async function turn() {
    const text = message.value.trim();
    if (!text) return say(trouble, "Write a message first.");
    const [mine, decoder] = [talk, next().select.value];
    const control = (mine.running = new AbortController());
    const history = [...mine.messages, { role: "user", content: text }];
    const first = context.value.trim() ? [{ role: "system", content: context.value.trim() }] : [];
    const asked = el("li", { class: "user" }, el("p", {}, text));
    const answer = el("li", { class: "answer" }, el("p", { class: "who" }, tag(decoder)), el("p", { class: "text" }));
    say(trouble, "");
    said.append(asked, answer);
    context.readOnly = true;
    opening.open = false;
    busy(true);
    try {
      const body = { model: decoder, messages: [...first, ...history], max_tokens: Number(limit.value) || 96, temperature: 0 };
      const told = await stream(body, mine.session, control.signal, (piece) => {
        answer.children[1].append(piece);
        answer.scrollIntoView({ block: "nearest" });
      });
      mine.messages = [...history, { role: "assistant", content: told.text }];
      if (mine !== talk) return;
      message.value = "";
      speakers.find((speaker) => speaker !== next()).radio.checked = true;
      name();
      message.focus();
      await showCost(mine, answer, told, decoder);
    } catch (error) {
      asked.remove();
      answer.remove();
      if (mine === talk) say(trouble, control.signal.aborted ? "Stopped. The session is as it was before." : error.message);
    } finally {
      mine.running = null;
      if (mine === talk) busy(false);
    }
  }

  async function stream(body, session, signal, show) {
    const answer = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", [SESSION_HEADER]: session, ...headers() },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    if (!answer.ok)
      throw new Error((await answer.json().catch(() => null))?.error?.message ?? `the router answered ${answer.status}`);
    const told = { id: "", text: "", usage: null };
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      told.id ||= event.id;
      told.usage = event.usage ?? told.usage;
      const piece = event.choices?.[0]?.delta?.content ?? "";
      told.text += piece;
      if (piece) show(piece);
    }
    return told;
  }

  /** What the turn cost, as the router's log of turns has it; where another router took the turn, as the answer said. */
  async function showCost(mine, answer, told, decoder) {
    let turn = null;
    for (let look = 0; look < LOOKS && !turn?.outcome; look += 1) {
      if (look) await new Promise((resolve) => setTimeout(resolve, 250));
      await ask().catch(() => {});
      turn = store.turnOf(told.id);
    }
    turn ??= asAnswered(told.usage, decoder);
    const bar = makeBar();
    mine.bars.push([bar, turn]);
    const whole = Math.max(...mine.bars.map(([, one]) => length(one)));
    for (const [each, one] of mine.bars) showBar(each, one, whole);
    const cost = el("p", { class: "cost" }, `${count(turn.prompt_tokens)} prompt tokens: ${words(turn)}`);
    answer.append(bar, cost);
    answer.scrollIntoView({ block: "nearest" });
  }

  begin();
}

function asAnswered(usage, decoder) {
  const cached = usage?.prompt_tokens_details?.cached_tokens ?? 0;
  const prompt = usage?.prompt_tokens ?? 0;
  const parts = { cached_tokens: cached, computed_tokens: prompt - cached, completion_tokens: usage?.completion_tokens ?? 0 };
  return { decoder, outcome: "ok", prefill_replica: "", prompt_tokens: prompt, ...parts };
}

function speaker(number, names, chosen) {
  const radio = el("input", { type: "radio", name: "next", "aria-label": `Decoder ${number + 1} answers next` });
  const select = el("select", { "aria-label": `Decoder ${number + 1}` }, ...names.map((name) => el("option", {}, name)));
  select.value = chosen;
  return { radio, select, line: el("div", { class: "speaker" }, radio, select) };
}

function field(text, control) {
  return el("label", {}, el("span", {}, text), control);
}

/** The events of a stream of server-sent events, as objects. */
async function* events(body) {
  let rest = "";
  for await (const piece of body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + piece).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data: ") ? line.slice(6).trim() : "";
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}
