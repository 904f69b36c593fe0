"""A deployment without engines: what routers call answers by arithmetic that can be done by hand, on virtual time.

    arithmetic.py  tokens and KV as small numbers: whose KV was read shows in every token that follows
    engines.py     a prefill and a decode replica that keep caches, leases and calls as real ones do
    cluster.py     pools of them behind the handles that Ray Serve gives, and every way in which they fail
    system.py      the router's own parts over such a cluster
"""
