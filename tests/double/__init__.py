"""A deployment without engines: replicas that answer routers by arithmetic that can be done by hand, on virtual time.

    arithmetic.py  tokens and KV as small numbers: every token shows whose KV was read before it
    engines.py     a prefill and a decode replica that keep caches, leases and calls as real ones do
    cluster.py     pools of such replicas behind handles like those of Ray Serve, and every way in which they fail
    frontend.py    turns without text, in the place of the router's Frontend
    system.py      the router's own parts over such a cluster
    process.py     such a system in a process of its own, with accounts in Redis, that can be killed
    page.py        the page at /ui over such a system, served on a port
"""
