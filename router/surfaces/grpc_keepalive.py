"""Long streams and idle channels over gRPC: who is pinged when, and which pings of clients are welcome.

A turn may be silent for minutes before its first token, and a channel between two turns for hours. gRPC's own settings close
the connections of clients that ping meanwhile (GOAWAY too_many_pings), and notice a client that vanished only by its next
message. Here clients may ping as often as they like, with calls under way or without; and the router pings them itself, so
that a client that is gone ends its turns, and what lies between takes no connection for dead.

Seam: https://github.com/grpc/grpc/blob/master/doc/keepalive.md
"""

from __future__ import annotations

#: A connection silent for so long is pinged, seconds. Less than the patience of usual load balancers with silence (60 s).
PING_AFTER_S = 30.0
#: One that then stays silent for so long is closed, and its calls are cancelled, seconds.
LOST_AFTER_S = 20.0


def server_options(ping_after_s: float = PING_AFTER_S, lost_after_s: float = LOST_AFTER_S) -> list[tuple[str, int]]:
    return [
        ("grpc.http2.max_ping_strikes", 0),  # no number of pings closes a connection
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", round(ping_after_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(lost_after_s * 1000)),
        # Pings that measure the connection count too: while one of them is unanswered, no other is sent.
        ("grpc.http2.ping_timeout_ms", round(lost_after_s * 1000)),
        ("grpc.http2.max_pings_without_data", 0),  # as often as that, though nothing else is sent
    ]
