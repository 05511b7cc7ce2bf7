"""A real Prometheus scrapes a real ingest and run; run inside namespaces by test_dashboards.py.

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
from tests.cluster.filled_files import ROOT

RAY = str(Path(sys.executable).parent / "ray")
PROMETHEUS = "http://127.0.0.1:9090"

SWEEP = """
import ray, ray.util.metrics, time
from physioray.telemetry import export_sweep
ray.init(address="auto", log_to_driver=False)
for _ in range(8):
    export_sweep(ray.util.metrics, "mask_ratio", {"running": 2, "finished": 5}, 0.61)
    time.sleep(1)
"""


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


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")


def query(expression: str) -> dict[str, Any]:
    return dict(requests.get(f"{PROMETHEUS}/api/v1/query", params={"query": expression}, timeout=10).json())


def ask_all(expressions: dict[str, str], answers: dict[str, Any]) -> None:
    """Keep the answer of every expression that has one now: series end with the process that exported them."""
    for title, expression in expressions.items():
        if not answers.get(title, {}).get("data", {}).get("result"):
            answers[title] = query(expression)


def main(folder: Path) -> None:
    prepare(folder)
    shorten_intervals(folder)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    start = [RAY, "start", "--head", "--num-cpus=4", "--object-store-memory=200000000", "--disable-usage-stats"]
    started = subprocess.run(start, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    if started.returncode:
        raise RuntimeError(started.stdout + started.stderr)
    os.environ["RAY_ADDRESS"] = "127.0.0.1:6379"
    server = subprocess.Popen(
        [sys.executable, "dashboards/serve.py", "--data", str(folder / "figures")],
        cwd=ROOT, stdout=(folder / "serve.log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    expressions = list_expressions(json.loads(FILE.read_text()))
    answers: dict[str, Any] = {}
    try:
        run("-m", "physioray.cli", "simulate", str(folder / "source"), "--subjects", "12", "--hours", "0.3")
        jobs = [
            ["-m", "physioray.cli", "ingest", str(folder / "source"), str(folder / "cohort")],
            ["-c", SWEEP],
            ["experiments/pretrain_strategy.py", "--strategy", "multimae_drop", "--preset", "tiny", "--passes", "12",
             "--cohort", str(folder / "cohort"), "--out", str(folder / "run")],
        ]  # fmt: skip
        for job in jobs:
            process = subprocess.Popen([sys.executable, *job], cwd=ROOT, stdout=subprocess.DEVNULL,
                                       stderr=(folder / "job.log").open("a"))  # fmt: skip
            while process.poll() is None:
                with suppress(requests.ConnectionError):
                    ask_all(expressions, answers)
                answered = {title for title, answer in answers.items() if answer.get("data", {}).get("result")}
                if job is jobs[-1] and len(answered) >= len(expressions) - 3:
                    process.terminate()
                time.sleep(0.5)
        targets = requests.get(f"{PROMETHEUS}/api/v1/targets", timeout=10).json()["data"]["activeTargets"]
        found = {
            "answers": answers,
            "expressions": expressions,
            "gpu": [title for title, text in expressions.items() if any(name in text for name in GPU_SERIES)],
            "targets": [(target["scrapeUrl"], target["health"]) for target in targets],
            "boards": sorted(
                path.name for path in Path("/tmp/ray/session_latest/metrics/grafana/dashboards").glob("*.json")
            ),
            "served": (folder / "serve.log").read_text()[:500],
        }
        (folder / "found.json").write_text(json.dumps(found))
    finally:
        server.terminate()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
