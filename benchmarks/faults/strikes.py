"""The ways in which a system is struck, and a run of all of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil

from benchmarks.faults.hang_ups import hang_up
from benchmarks.faults.nodes import Nodes
from benchmarks.faults.processes import routers, stopped, titled
from benchmarks.shared.beside import Beside
from benchmarks.shared.redis_server import RedisServer
from benchmarks.shared.small import DECODERS, GRPC_PORT, HTTP_PORT

HANG_S, REDIS_AWAY_S = 12, 3
HANG_UPS = 200
HTTP_URL = f"http://127.0.0.1:{HTTP_PORT}"
#: Seconds that a fault may take to show, or to pass.
SETTLE_S = 60
#: Pool -> its replicas.
POOLS = {"prefill": 2, "agents": 2}


class Strikes(Beside):
    """Every kind of fault can strike. `pools`: pool -> its replicas. `ejected`: replicas that get no turns any more although no
    fault was aimed at them. Faults strike while the context lasts."""

    def __init__(
        self, handle, nodes: Nodes, redis: RedisServer, log: Callable[[str], None], pools: Mapping[str, int] = POOLS
    ):
        super().__init__()
        self._handle, self._nodes, self._redis, self._log, self._pools = handle, nodes, redis, log, pools
        self.struck: list[tuple[str, float]] = []
        #: Kind of fault -> seconds until a router gave the replica no more work, and until what had died was there again.
        self.known_after_s: dict[str, float] = {}
        self.back_after_s: dict[str, float] = {}
        self.ejected: set[str] = set()
        #: What strikes now; "" between faults.
        self.now = ""
        self._victims: set[str] = set()
        self.kinds: dict[str, Callable[[str], None]] = {
            "kill router": lambda kind: self._kill(partial(routers, GRPC_PORT), 2),
            **{f"{how} {pool}": self._replica for how in ("kill", "hang", "kill engine") for pool in pools},
            "kill controller": lambda kind: self._kill(partial(titled, "ray::ServeController"), 1),
            "kill proxy": lambda kind: self._kill(partial(titled, "ray::ProxyActor"), 2),
            "kill raylet": self._raylet,
            "hang up": self._hang_up,
            "kill redis": self._kill_redis,
            "hang redis": self._hang_redis,
        }

    def info(self) -> dict:
        return self._handle.replica_info.remote().result(timeout_s=60)

    def whole(self) -> bool:
        pools = self.info()
        unusable = {name for pool in pools.values() for name, replica in pool.items() if not replica["usable"]}
        self.ejected |= unusable - self._victims
        sizes = {name: len(pool) for name, pool in pools.items()}
        return len(routers(GRPC_PORT)) == 2 and sizes == self._pools and not unusable

    def _strike(self, kind: str, until: Callable[[], bool] = lambda: True) -> None:
        """Returns when `until` holds."""
        self.now = kind
        self.struck.append((kind, time.monotonic()))
        self._log(kind)
        try:
            self.kinds[kind](kind)
            self._until(until)
        finally:
            self.now = ""

    def _kill(self, running: Callable[[], list[psutil.Process]], wanted: int) -> None:
        """Kill one of the `running` processes. Serve starts another one."""
        victim = running()[0]
        victim.kill()
        self._until(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE)
        self._until(lambda: len(running()) == wanted)

    def _replica(self, kind: str) -> None:
        how, pool = kind.rsplit(" ", 1)
        stats = self._handle.replica_stats.remote().result(timeout_s=60)[pool]
        busiest = max(stats, key=lambda replica: stats[replica]["active"])
        self._victims.add(busiest)
        parent = psutil.Process(self.info()[pool][busiest]["pid"])
        engine = parent.children(recursive=True)
        if how == "hang":
            with stopped([parent, *engine]):
                self._stop.wait(HANG_S)
            return
        for process in [parent] if how == "kill" else engine:
            os.kill(process.pid, signal.SIGKILL)
        self._until(lambda: not self.info()[pool].get(busiest, {}).get("usable"))
        self.known_after_s[kind] = round(time.monotonic() - self.struck[-1][1], 2)

    def _raylet(self, kind: str) -> None:
        """Kill the raylet of the second node, which joins anew; what the node runs ends with it."""
        there = self._nodes.second()
        self._victims |= {name for pool in self.info().values() for name, replica in pool.items() if replica["pid"] in there}
        self._nodes.kill_second_raylet()
        self._nodes.start_second()

    def _hang_up(self, kind: str) -> None:
        """HTTP clients hang up, several at once."""
        with ThreadPoolExecutor(16) as clients:
            list(clients.map(lambda number: hang_up(HTTP_URL, DECODERS[0], number, 200), range(HANG_UPS)))

    def _kill_redis(self, kind: str) -> None:
        self._redis.kill()
        self._stop.wait(REDIS_AWAY_S)
        self._redis.start()

    def _hang_redis(self, kind: str) -> None:
        self._redis.pause()
        self._stop.wait(REDIS_AWAY_S)
        self._redis.resume()

    def _until(self, done: Callable[[], bool], limit_s: float = SETTLE_S) -> bool:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            try:
                if done():
                    return True
            except Exception as error:  # routers come and go
                self._log(f"[dim]{type(error).__name__}: asked again[/]")
            time.sleep(0.2)
        return False


class Faults(Strikes):
    """Lets every kind of fault strike once, each one when the system is whole again."""

    @property
    def all_have_struck(self) -> bool:
        return len(self.struck) >= len(self.kinds) and not self.now

    def _run(self) -> None:
        kinds = list(self.kinds)
        while not self._stop.is_set():
            try:
                if self.whole() and len(self.struck) < len(kinds):
                    kind, began = kinds[len(self.struck)], time.monotonic()
                    self._strike(kind, until=self.whole)
                    self.back_after_s[kind] = round(time.monotonic() - began, 2)
            except Exception as error:  # a replica that is ending cannot be asked; the next round asks again
                self._log(f"[dim]{type(error).__name__}: asked again[/]")
            self._stop.wait(0.5)
