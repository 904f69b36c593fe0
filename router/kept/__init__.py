"""What tenants keep: contexts whose KV stays in the engines' caches for a time, within a budget.

    kept.py       one kept context, and how its blocks are counted
    budgets.py    how much a tenant may keep, and all of them together
    store.py      who keeps what until when: in memory (memory.py), or in Redis for all routers (redis.py, scripts.py)
    holding.py    has replicas keep it (kvshare_vllm/engine/retention.py)
    keeper.py     keep, prolong, let go
    upkeep.py     what a replica no longer keeps is kept elsewhere
"""
