"""A Ray cluster of two nodes, the second of which may die and come back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import psutil

from benchmarks.shared.hosts import Host
from prefillshare.cluster import keep_token_private

START_S = 60
#: Resources of each node, so that every pool has one replica on each; routers run on the first node.
SLOTS = {"prefill-slot": 1, "decode-slot": 1}
HEAD = {"head": 1}


class Nodes:
    """`port`: of the head node. `hosts`: the one that this process is on, with the head node, and the second node's; None: both
    nodes are on this machine's loopback. `labels`: of both nodes. Both nodes end with the context."""

    def __init__(
        self,
        folder: Path,
        port: int,
        hosts: tuple[Host, Host] | None = None,
        labels: Mapping[str, str] = MappingProxyType({}),
    ):
        self._labels = ",".join(f"{name}={value}" for name, value in labels.items())
        self._folder, self._hosts = folder, hosts
        self.address = f"{hosts[0].address if hosts else '127.0.0.1'}:{port}"
        self._port, self._started = port, 0
        self._head: subprocess.Popen | None = None
        self._second: subprocess.Popen | None = None

    def __enter__(self) -> Nodes:
        keep_token_private()
        at = [f"--node-ip-address={self._hosts[0].address}"] if self._hosts else []
        words = ["--head", *at, f"--port={self._port}", "--include-dashboard=false", f"--temp-dir={self._folder / 'ray'}"]
        self._head = self._start(words, SLOTS | HEAD)
        self.start_second()
        return self

    def __exit__(self, *_) -> None:
        for node in (self._second, self._head):
            if node is not None:
                _kill(node)

    def start_second(self) -> None:
        at = [f"--node-ip-address={self._hosts[1].address}"] if self._hosts else []
        self._second = self._start([f"--address={self.address}", *at], SLOTS, self._hosts and self._hosts[1])

    def second(self) -> set[int]:
        """Process ids of the second node: its raylet, and all processes that it has started."""
        return {process.pid for process in psutil.Process(self._second.pid).children(recursive=True)}

    def kill_second_raylet(self) -> None:
        """Kill the second node's raylet; its workers end with it."""
        for process in psutil.Process(self._second.pid).children(recursive=True):
            if process.name() == "raylet":
                process.kill()
        self._second.wait(timeout=START_S)

    def _start(self, words: list[str], resources: dict[str, float], host: Host | None = None) -> subprocess.Popen:
        self._started += 1
        log = self._folder / f"node-{self._started}.log"
        command = [Path(sys.executable).with_name("ray"), "start", "--block", "--disable-usage-stats", "--num-cpus=2",
                   "--object-store-memory=100000000", f"--resources={json.dumps(resources)}", *words]  # fmt: skip
        if self._labels:
            command.append(f"--labels={self._labels}")
        if host:
            command = host.on_it(command)
        with log.open("w") as out:
            node = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "RAY_AUTH_MODE": "token"})
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in log.read_text():
            if node.poll() is not None or time.monotonic() > deadline:
                _kill(node)
                raise RuntimeError(f"a Ray node did not start:\n{log.read_text()}")
            time.sleep(0.1)
        return node


def _kill(node: subprocess.Popen) -> None:
    try:
        family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    node.wait(timeout=START_S)
