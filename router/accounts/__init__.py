"""What tenants have used, and how much they may use a minute: in memory for one router, in Redis for several.

    figures.py       what is counted
    kv_time.py       KV byte-seconds of one turn
    account.py       one turn's account, from its admission to its end
    ledger.py        the ledger: its interface, and the one in memory;    redis_ledger.py  the one in Redis
    limits.py        the limits: their interface, and those in memory;    redis_limits.py  those in Redis
    bucket.py        the arithmetic of a limit per minute
    scripts.py       what runs on the Redis server (called through router/redis_calls.py)
    accounts.py      all of it together, as a router has it
"""
