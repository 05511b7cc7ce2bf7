"""A real Prometheus scrapes a real ingest, sweep and run; run inside namespaces by test_dashboards.py.

python -m tests.cluster.scrape FOLDER     writes FOLDER/found.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests

from dashboards.generate import FILE, GPU_SERIES, list_expressions
from tests.cluster.figures_made import INGESTED, REJECTED, SWEPT
from tests.cluster.filled_files import ROOT

RAY = str(Path(sys.executable).parent / "ray")
PROMETHEUS = "http://127.0.0.1:9090"

PATIENCE = 900.0
"""Seconds after which it is given up; a free machine takes a minute, one with many other jobs ten."""


def prepare(folder: Path) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    Path("/tmp/ray").mkdir(exist_ok=True)
    (folder / "tmp_ray").mkdir()
    subprocess.run(["mount", "--bind", str(folder / "tmp_ray"), "/tmp/ray"], check=True)
    os.environ |= {
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        # Both sides every second, so that a short run leaves enough points.
        "RAY_metrics_report_interval_ms": "1000",
        # Beside other jobs Ray's workers (niceness 15) stand still.
        "RAY_worker_niceness": "0",
    }


def shorten_intervals(folder: Path) -> None:
    """The committed settings, read every second, as a `prometheus` that serve.py finds first."""
    text = (ROOT / "dashboards" / "prometheus.yml").read_text().replace("10s", "1s")
    (folder / "prometheus.yml").write_text(text)
    commands = folder / "commands"
    commands.mkdir()
    real = subprocess.run(["which", "prometheus"], capture_output=True, text=True, check=True).stdout.strip()
    (commands / "prometheus").write_text(
        f'#!/bin/bash\nshift\nexec {real} --config.file={folder}/prometheus.yml "$@"\n'
    )
    (commands / "prometheus").chmod(0o755)
    os.environ["PATH"] = f"{commands}:{os.environ['PATH']}"


def query(expression: str) -> dict[str, Any]:
    return dict(requests.get(f"{PROMETHEUS}/api/v1/query", params={"query": expression}, timeout=10).json())


def ask_all(expressions: dict[str, str], answers: dict[str, Any]) -> None:
    """Keep the answer of every expression that has one now: series end with the process that exported them."""
    for title, expression in expressions.items():
        if not is_answered(title, answers.get(title, {})):
            answers[title] = query(expression)


def is_answered(title: str, answer: dict[str, Any]) -> bool:
    """Whether there is data: of ingest and sweep the last, when every recording and trial has its outcome."""
    result = answer.get("data", {}).get("result", [])
    counts = {item["metric"].get("state", item["metric"].get("outcome")): float(item["value"][1]) for item in result}
    if title == "Trials":
        return counts.get("finished", 0) + counts.get("stopped", 0) == SWEPT
    if title == "Recordings":
        return counts.get("accepted") == INGESTED and counts.get("rejected") == REJECTED
    if title == "Hours of signal":
        return any(value > 0 for value in counts.values())
    return bool(result)


def watch(folder: Path, expressions: dict[str, str]) -> dict[str, Any]:
    """Answers of all expressions, asked while ingest, sweep and training run, until each that can has its data."""
    gpu = list_gpu(expressions)
    answers: dict[str, Any] = {}
    with (folder / "job.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "tests.cluster.figures_made", str(folder)], cwd=ROOT,
                                   stdout=log, stderr=log)  # fmt: skip
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with suppress(requests.ConnectionError):
            ask_all(expressions, answers)
        if all(title in gpu or is_answered(title, answers.get(title, {})) for title in expressions):
            break
        if process.poll() is not None:
            raise RuntimeError("What should be scraped has ended: " + (folder / "job.log").read_text()[-3000:])
        time.sleep(0.5)
    process.kill()
    return answers


def list_gpu(expressions: dict[str, str]) -> list[str]:
    return [title for title, text in expressions.items() if any(name in text for name in GPU_SERIES)]


def main(folder: Path) -> None:
    prepare(folder)
    shorten_intervals(folder)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    start = [RAY, "start", "--head", "--num-cpus=3", "--object-store-memory=200000000", "--disable-usage-stats"]
    started = subprocess.run(start, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    if started.returncode:
        raise RuntimeError(started.stdout + started.stderr)
    os.environ["RAY_ADDRESS"] = "127.0.0.1:6379"
    server = subprocess.Popen(
        [sys.executable, "dashboards/serve.py", "--data", str(folder / "figures")],
        cwd=ROOT, stdout=(folder / "serve.log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    expressions = list_expressions(json.loads(FILE.read_text()))
    try:
        began = time.monotonic()
        answers = watch(folder, expressions)
        targets = requests.get(f"{PROMETHEUS}/api/v1/targets", timeout=10).json()["data"]["activeTargets"]
        found = {
            "answers": answers,
            "unanswered": [title for title in expressions if not is_answered(title, answers.get(title, {}))],
            "seconds": time.monotonic() - began,
            "gpu": list_gpu(expressions),
            "targets": [(target["scrapeUrl"], target["health"]) for target in targets],
            "boards": sorted(
                path.name for path in Path("/tmp/ray/session_latest/metrics/grafana/dashboards").glob("*.json")
            ),
            "served": (folder / "serve.log").read_text()[:500],
            "log": (folder / "job.log").read_text()[-3000:],
        }
        (folder / "found.json").write_text(json.dumps(found))
    finally:
        server.terminate()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
