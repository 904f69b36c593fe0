"""One gRPC session with three decoders: what each of them writes is part of the context of the next.

An agent's own instructions go into a suffix: that turn's decoder sees them, and the session does not keep them. So agents with
different instructions share everything in front of them.

    prefillshare serve deploy/configs/demo.yaml
    .venv-examples/bin/python examples/grpc_session.py
"""

from __future__ import annotations

import argparse
import uuid

from figures import print_head, print_turn

from prefillshare.client import Client
from prefillshare.kvshare.errors import NotFound

#: The number makes each run a context of its own: a second run would find everything that the first has computed.
BRIEF = f"""Notes {uuid.uuid4().hex[:8]}: we run a ferry line between the mainland and three islands.
A ferry carries up to 220 passengers and 40 cars. People book on the web, at two ticket offices and by phone. A place is held
for ten minutes while somebody pays, and is given back if they do not. Tickets can be changed until one hour before departure.
Residents of the islands pay half. A bicycle counts as a quarter of a car place. In bad weather the line cancels departures:
everybody who booked gets a message, and may choose another departure or their money back."""

#: Decoder, what it is told of itself, what is asked.
TURNS = (
    ("base", "You plan. Answer in short steps.", "What do we have to do before the season begins?"),
    ("arithmetic", "Solve the problem step by step. End with #### and the result.",
     "3 adults pay 14 euros each, and 2 residents half of that. How much do they pay together?"),
    ("tools", 'You answer with one call of a function, like {"name": "book_ticket", "arguments": {"passengers": 1}}.',
     "Book the northern route for the five of them."),
    ("base", "You write to customers, in one sentence.", "Tell them what they pay, and that their places are held."),
)  # fmt: skip


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--address", default="127.0.0.1:9000")
    address = parser.parse_args().address

    with Client(address) as client:  # API keys: Client(address, api_key=...), or the variable PREFILLSHARE_API_KEY
        session = client.create_session(messages=[message("system", "You help a ferry line."), message("user", BRIEF)])
        print_head()
        for decoder, told, question in TURNS:
            pieces = session.stream(
                decoder,
                messages=[message("user", question)],  # what the session keeps
                suffix_messages=[message("system", told)],  # what only this turn sees
                max_tokens=48,
                temperature=0,
            )
            for piece in pieces:
                print(piece.text, end="", flush=True)
                if piece.HasField("done"):  # the last piece says what the turn has cost
                    usage = piece.done.usage
            print()
            where = f"{usage.prefill_replica} -> {usage.decode_replica}"
            print_turn(decoder, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, where)

        # The server has kept the context as token ids. It is forgotten when it is deleted, or after router.session_ttl_s.
        print(f"the session holds {session.get().context_tokens} tokens")
        session.delete()
        try:
            session.get()
        except NotFound as error:  # errors are typed, and say what to do
            print(f"afterwards: {error}")


if __name__ == "__main__":
    main()
