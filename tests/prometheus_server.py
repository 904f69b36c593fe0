"""A Prometheus server for a test, on a loopback port."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import httpx
import yaml

START_TIMEOUT_S = 30


class Prometheus:
    """Scrapes `targets` (host:port) and evaluates `rules` every two seconds; keeps its data in `folder`."""

    def __init__(self, folder: Path, port: int, targets: list[str], rules: Path):
        every = {"scrape_interval": "2s", "evaluation_interval": "2s"}
        jobs = [{"job_name": "prefillshare", "static_configs": [{"targets": targets}]}]
        self._folder, self._port = folder, port
        (folder / "prometheus.yml").write_text(
            yaml.safe_dump({"global": every, "rule_files": [str(rules)], "scrape_configs": jobs})
        )

    def __enter__(self) -> Prometheus:
        command = [
            "prometheus", f"--config.file={self._folder / 'prometheus.yml'}", f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self._port}",
        ]  # fmt: skip
        with (self._folder / "log").open("w") as log:
            try:
                self._process = subprocess.Popen(command, stdout=log, stderr=log)
            except FileNotFoundError:
                raise RuntimeError("prometheus is not installed: apt-get install prometheus") from None
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=10, trust_env=False)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"prometheus did not start:\n{(self._folder / 'log').read_text()}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_) -> None:
        self._http.close()
        self._process.kill()
        self._process.wait()

    def _is_ready(self) -> bool:
        try:
            return self._http.get("/-/ready").is_success
        except httpx.TransportError:
            return False

    def query(self, expression: str) -> list[dict]:
        """[{"metric": labels, "value": [time, text]}]"""
        answer = self._http.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", f"{expression}: {answer.get('error')}"
        return answer["data"]["result"]

    def value(self, expression: str) -> float:
        (found,) = self.query(expression)
        return float(found["value"][1])

    def rules(self) -> list[dict]:
        groups = self._http.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def targets(self) -> list[dict]:
        return self._http.get("/api/v1/targets").json()["data"]["activeTargets"]
