"""Fan-out and join: several decoders work on one context at once, and one of them reads what all have written.

A fork is a session with the same context, and costs no KV. All forks read the context's KV from one place; each computes only
its own question. Then the base reads the answers, behind the same context.

    prefillshare serve deploy/configs/demo.yaml
    .venv-examples/bin/python examples/forks.py
"""

from __future__ import annotations

import argparse
import uuid
from concurrent.futures import ThreadPoolExecutor

from figures import print_head, print_turn

from prefillshare.client import Client, RemoteSession, TurnResult

#: The number makes each run a context of its own: a second run would find everything that the first has computed.
BRIEF = f"""Notes {uuid.uuid4().hex[:8]}: we run a ferry line between the mainland and three islands.
A ferry carries up to 220 passengers and 40 cars. People book on the web, at two ticket offices and by phone. A place is held
for ten minutes while somebody pays, and is given back if they do not. Tickets can be changed until one hour before departure.
Residents of the islands pay half. A bicycle counts as a quarter of a car place. In bad weather the line cancels departures:
everybody who booked gets a message, and may choose another departure or their money back."""

#: Decoder and question of each fork.
AT_ONCE = (
    ("base", "Which risks do you see in these rules?"),
    ("arithmetic", "How many passengers do four ferries carry that go three times a day? End with #### and the result."),
    ("tools", 'Answer with one call of a function, like {"name": "notify", "arguments": {"text": "..."}}: a departure is off.'),
    ("base", "What would a customer ask about these rules?"),
)


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def ask(session: RemoteSession, decoder: str, question: str) -> TurnResult:
    return session.turn(decoder, messages=user(question), max_tokens=40, temperature=0)


def report(decoder: str, turn: TurnResult) -> None:
    usage = turn.usage
    where = f"{usage.prefill_replica} -> {usage.decode_replica}"
    print_turn(decoder, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--address", default="127.0.0.1:9000")
    address = parser.parse_args().address

    with Client(address) as client, ThreadPoolExecutor(len(AT_ONCE)) as pool:
        session = client.create_session(messages=user(BRIEF))
        print_head()
        report("base", ask(session, "base", "Sum the rules up in one sentence."))

        # Fan out. A session takes one turn at a time; forks take theirs at once, in the same batch of the engines.
        forks = [session.fork() for _ in AT_ONCE]
        running = [pool.submit(ask, fork, *of) for fork, of in zip(forks, AT_ONCE, strict=True)]
        answers = [turn.result() for turn in running]
        for (decoder, _), turn in zip(AT_ONCE, answers, strict=True):
            report(decoder, turn)

        # Join. The first session has not changed meanwhile, and only the answers are new to it.
        found = "\n\n".join(turn.text for turn in answers)
        joined = ask(session, "base", f"Others have found out:\n{found}\n\nWhat matters most of it?")
        report("base", joined)
        print(joined.text)
        for one in (session, *forks):
            one.delete()


if __name__ == "__main__":
    main()
