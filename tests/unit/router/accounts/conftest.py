"""The stores of accounts: both kinds, or Redis only."""

import pytest
from account_stores import InMemory, InRedis


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.slow)])
async def stores(request):
    made = InMemory() if request.param == "memory" else InRedis(request.getfixturevalue("redis_server").url)
    yield made
    await made.close()


@pytest.fixture
async def in_redis(redis_server):
    made = InRedis(redis_server.url)
    yield made
    await made.close()
