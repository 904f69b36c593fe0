"""The ledger: what each tenant has used of each decoder, by day."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta

from prefillshare.router.accounts.figures import NOTHING, Figures, Place, Row


def today() -> date:
    """Days of the ledger are in UTC."""
    return datetime.now(UTC).date()


class Ledger(ABC):
    """Keeps the last `keep_days` days. `day`: says which day it is."""

    def __init__(self, keep_days: int, day: Callable[[], date] = today):
        self._keep_days, self._day = keep_days, day

    @abstractmethod
    def add(self, tenant: str, decoder: str, used: Figures) -> None:
        """Add to today's figures, without waiting."""

    @abstractmethod
    async def written(self) -> None:
        """Wait until what has been added is where it outlives this router, if there is such a place and it answers in time."""

    @abstractmethod
    async def rows(self, since: date | None = None, until: date | None = None) -> list[Row]:
        """The kept days from `since` to `until`, both included, sorted. Raises Unavailable."""

    @abstractmethod
    async def close(self) -> None:
        """Write what is left, within seconds, and end."""

    @property
    def _first_day(self) -> date:
        return self._day() - timedelta(days=self._keep_days - 1)


class MemoryLedger(Ledger):
    """That of a deployment's only router. It is lost when the router ends."""

    def __init__(self, keep_days: int, day: Callable[[], date] = today):
        super().__init__(keep_days, day)
        self._figures: dict[Place, Figures] = {}
        self._today: date | None = None

    def add(self, tenant: str, decoder: str, used: Figures) -> None:
        day = self._day()
        if day != self._today:
            self._today = day
            self._figures = {place: kept for place, kept in self._figures.items() if place.day >= self._first_day}
        place = Place(day, tenant, decoder)
        self._figures[place] = self._figures.get(place, NOTHING).plus(used)

    async def written(self) -> None:
        pass

    async def rows(self, since: date | None = None, until: date | None = None) -> list[Row]:
        first, last = max(since or self._first_day, self._first_day), until or self._day()
        return sorted(Row(place, figures) for place, figures in self._figures.items() if first <= place.day <= last)

    async def close(self) -> None:
        pass
