"""The Grafana dashboard against its generator, PromQL's grammar, the code's figures, and a real Prometheus."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from dashboards.generate import FILE, GPU_SERIES, generate, list_expressions
from dashboards.serve import provision
from physioray.telemetry import FIGURES, RunTelemetry, find_figure, set_figure
from tests.cluster.filled_files import ROOT
from tests.cluster.kept import keep_text
from tests.cluster.namespaces import ISOLATED, explain_missing

EXPRESSIONS = list_expressions(json.loads(FILE.read_text()))


def name_series(expression: Any) -> set[str]:
    """Names of all series in a parsed expression."""
    if isinstance(expression, promql_parser.VectorSelector):
        return {expression.name}
    inner = [getattr(expression, name, None) for name in ("expr", "lhs", "rhs", "vector_selector", "vs")]
    inner += list(getattr(expression, "args", None) or [])
    return {name for part in inner if part is not None for name in name_series(part)}


def test_the_committed_dashboard_is_what_the_generator_writes() -> None:
    assert FILE.read_text() == generate(), "run: python dashboards/generate.py"


@pytest.mark.parametrize("title", EXPRESSIONS)
def test_every_expression_is_promql_over_series_that_exist(title: str) -> None:
    found = name_series(promql_parser.parse(EXPRESSIONS[title]))
    assert found and found <= {figure.series for figure in FIGURES.values()} | set(GPU_SERIES)


def test_every_exported_figure_has_a_place_on_the_dashboard() -> None:
    shown = " ".join(EXPRESSIONS.values())
    assert all(figure.series in shown for figure in FIGURES.values())


def test_the_settings_read_the_file_in_which_ray_lists_its_nodes() -> None:
    settings = yaml.safe_load((ROOT / "dashboards" / "prometheus.yml").read_text())
    [job] = settings["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]


def test_provisioning_without_a_cluster_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Start the cluster first"):
        provision(tmp_path / "absent")


class Recorder:
    """Stands for ray.util.metrics: keeps what was told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float, dict[str, str]]] = []

    def make(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Recorder.Figure:
        assert description and tag_keys == find_figure(name).tags
        return Recorder.Figure(name, self.told)

    Gauge = Counter = make

    class Figure:
        def __init__(self, name: str, told: list[tuple[str, float, dict[str, str]]]) -> None:
            self.name, self.told = name, told

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) and set(tags) == set(find_figure(self.name).tags)
            self.told.append((self.name, value, tags))

        inc = set


class At:
    def __init__(self, step: int) -> None:
        self.step = step


def test_windows_that_a_checkpoint_brought_are_not_counted_as_done_now() -> None:
    recorder = Recorder()
    telemetry = RunTelemetry(recorder, "r", passes=2, batch_size=16)
    telemetry.report_step(At(101), 100, 1.0, 4.0)
    telemetry.told_time = float("-inf")
    telemetry.report_step(At(104), 100, 2.0, 4.0)
    told = [(name, value) for name, value, _ in recorder.told]
    assert [value for name, value in told if name == "physioray_windows"] == [16, 48]
    assert [value for name, value in told if name == "physioray_wait_share"] == [0.25, 0.5]
    assert [value for name, value in told if name == "physioray_steps_planned"] == [200, 200]


def test_losses_are_told_by_split_and_modality_and_an_absent_one_is_not_zero() -> None:
    recorder = Recorder()
    record = {"loss": 2.0, "loss_by_modality": {"eeg": 1.5}, "validation_loss": None}
    RunTelemetry(recorder, "r", passes=2, batch_size=16).report_pass([record], [])
    assert [(value, tags["split"], tags["modality"]) for _, value, tags in recorder.told] == [
        (1.5, "train", "eeg"),
        (2.0, "train", "all"),
    ]


def test_a_figure_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(LookupError, match="physioray_windows"):
        set_figure(Recorder(), "physioray_speed", 1.0)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.ray
def test_a_real_prometheus_answers_every_expression_from_a_real_ingest_sweep_and_run(tmp_path: Path) -> None:
    reason = explain_missing()
    if reason or shutil.which("prometheus") is None:
        pytest.skip(reason or "needs prometheus (Debian: prometheus)")
    command = [*ISOLATED, "--mount", sys.executable, "-m", "tests.cluster.scrape", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(answer["status"] == "success" for answer in found["answers"].values())
    keep_text("prometheus.txt", describe(found))
    # This machine has no GPU: these panels stay empty, and no other. Ingest counts the rejected recording, the sweep
    # every trial (see tests/cluster/scrape.py).
    assert found["gpu"] == ["GPU busy", "Windows per second and busy GPU", "GPU memory"]
    assert set(found["unanswered"]) <= set(found["gpu"]), found["log"]
    assert found["targets"] and all(health == "up" for _, health in found["targets"])
    assert "physioray.json" in found["boards"] and len(found["boards"]) > 5
    assert "127.0.0.1:9090" in found["served"]


def describe(found: dict[str, Any]) -> str:
    """Every panel with what Prometheus answered."""
    lines = [f"All data after {found['seconds']:.0f} s. Targets: {found['targets']}"]
    for title, answer in found["answers"].items():
        values = [(item["metric"], item["value"][1]) for item in answer["data"]["result"]]
        lines.append(f"{title}: {values or 'nothing'}")
    return "\n".join(lines)
