"""The ledger: what was used is found again by day, tenant and decoder, in memory and in Redis."""

from datetime import date, timedelta

from prefillshare.router.accounts.figures import Figures, Place, Row

FIRST = date(2026, 5, 1)


async def test_what_is_added_is_summed_by_day_tenant_and_decoder(stores):
    ledger = stores.ledger()
    ledger.add("acme", "tools", Figures(1, 100, 60, 40))
    ledger.add("acme", "tools", Figures(generated_tokens=7, kv_byte_seconds=3 << 40))
    ledger.add("", "tools", Figures(1, 5))
    ledger.add("acme", "math", Figures(1, 9))
    stores.today += timedelta(days=1)
    ledger.add("acme", "tools", Figures(generated_tokens=1))
    await ledger.written()
    assert await ledger.rows() == [
        Row(Place(FIRST, "", "tools"), Figures(1, 5)),
        Row(Place(FIRST, "acme", "math"), Figures(1, 9)),
        Row(Place(FIRST, "acme", "tools"), Figures(1, 100, 60, 40, 7, 3 << 40)),
        Row(Place(FIRST + timedelta(days=1), "acme", "tools"), Figures(generated_tokens=1)),
    ]


async def test_days_are_chosen_both_ends_included(stores):
    ledger = stores.ledger()
    for _ in range(4):
        ledger.add("a", "d", Figures(1))
        await ledger.written()
        stores.today += timedelta(days=1)
    days = [FIRST + timedelta(days=n) for n in range(4)]

    async def found(since=None, until=None) -> list[date]:
        return [row.place.day for row in await ledger.rows(since, until)]

    assert await found() == days
    assert await found(days[1], days[2]) == days[1:3]
    assert await found(since=days[3]) == days[3:]
    assert await found(until=days[0]) == days[:1]
    assert await found(since=days[3] + timedelta(days=1)) == []


async def test_days_beyond_those_that_are_kept_are_forgotten(stores):
    ledger = stores.ledger(keep_days=2)
    for _ in range(3):
        ledger.add("a", "d", Figures(1))
        await ledger.written()
        stores.today += timedelta(days=1)
    stores.today -= timedelta(days=1)
    assert [row.place.day for row in await ledger.rows()] == [FIRST + timedelta(days=1), FIRST + timedelta(days=2)]


async def test_an_empty_ledger_has_no_rows(stores):
    assert await stores.ledger().rows() == []
