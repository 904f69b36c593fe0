"""Keepalive of long streams and idle channels over gRPC: when clients are pinged, and which of their pings are accepted.

A turn may be silent for minutes before its first token, and a channel between two turns for hours. With gRPC's own settings, a
server closes the connections of clients that ping meanwhile (GOAWAY too_many_pings), and notices that a client has vanished
only by the next message. Here clients may ping as often as they like, with or without calls under way. The router pings them,
too, so that the turns of a client that is gone end, and no load balancer in between takes a connection for dead.

Seam: https://github.com/grpc/grpc/blob/master/doc/keepalive.md
"""

from __future__ import annotations

#: A connection that has been silent for this many seconds is pinged. Less than the usual idle timeout of load balancers (60 s).
PING_AFTER_S = 30.0
#: A connection that then stays silent for this many seconds is closed, and its calls are cancelled.
LOST_AFTER_S = 20.0


def server_options(ping_after_s: float = PING_AFTER_S, lost_after_s: float = LOST_AFTER_S) -> list[tuple[str, int]]:
    return [
        ("grpc.http2.max_ping_strikes", 0),  # no number of pings closes a connection
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", round(ping_after_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(lost_after_s * 1000)),
        # Pings by which gRPC measures the connection count, too: while one of them is unanswered, no other is sent.
        ("grpc.http2.ping_timeout_ms", round(lost_after_s * 1000)),
        ("grpc.http2.max_pings_without_data", 0),  # at that interval, even if nothing else is sent
    ]
