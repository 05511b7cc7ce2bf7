"""How a sweep is shown: TensorBoard's own HPARAMS table, in its backend and in a browser, and one page."""

import re
import socket
import subprocess
import sys
import time
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from physioray.presets import find_preset
from physioray.search_space import choice, list_grid, loguniform
from physioray.storage import StorageError, open_location
from physioray.sweep_figures import plot_field
from physioray.sweep_journal import SweepResult, TrialRecord
from physioray.sweep_plan import Objective, SweepPlan
from physioray.sweep_report import describe_sweep, write_sweep_report
from physioray.sweep_trial import Trial
from tests.sweep_trials import FitConfig, fit_logistic, make_plan, sweep_by_hand

CHROMIUM = Path("/usr/bin/chromium")
COMMAND = "python experiments/evaluate.py --checkpoint {folder} --trial {number}"


def fit_with_interval(trial: Trial) -> None:
    if trial.number == 4:
        raise RuntimeError("<no luck>")
    report = trial.report

    def wide_report(*, epoch: float, score: float, accuracy: float) -> None:
        report(epoch=epoch, score=score, score_low=score - 0.05, score_high=score + 0.05, accuracy=accuracy)

    trial.report = wide_report  # type: ignore[method-assign, assignment]
    fit_logistic(trial)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    plan = make_plan(
        trials=10,
        max_failures=0,
        evaluate_command=COMMAND,
        space={"fit.learning_rate": loguniform(1e-2, 3.0), "drop": choice([True, False])},
        base={"fit": FitConfig(), "drop": True, "betas": (0.9, 0.95), "none": None},
        objectives=(Objective(metric="score"), Objective(metric="seconds", mode="min")),
        scheduler=None,
    )
    result = sweep_by_hand(plan, fit_with_interval, tmp_path_factory.mktemp("swept"))
    write_sweep_report(result.folder)
    return result


def read_table(folder: str) -> tuple[Any, Any]:
    """What TensorBoard's HPARAMS tab would ask its backend for: columns, and rows."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    events = EventMultiplexer().AddRunsFromDirectory(folder)
    events.Reload()
    context = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(events, folder)))
    found = context.hparams_metadata(RequestContext(), "")
    experiment = context.experiment_from_metadata(RequestContext(), "", True, found, [])
    statuses = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING]
    request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=100, allowed_statuses=statuses)
    return experiment, list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups


def test_tensorboards_own_table_has_every_trial_with_all_settings_and_final_scores(swept: SweepResult) -> None:
    from tensorboard.plugins.hparams import api_pb2

    experiment, rows = read_table(swept.folder.path)
    columns = [column.name for column in experiment.hparam_infos]
    # The varied settings stand first, because TensorBoard shows a handful of columns.
    assert set(columns[:3]) == {"SIMULATED SIGNALS", "drop", "fit.learning_rate"}
    assert set(columns) == {
        *("SIMULATED SIGNALS", "drop", "betas", "none"),
        *("fit.learning_rate", "fit.penalty", "fit.passes"),
    }
    assert [info.name.tag for info in experiment.metric_infos] == ["final/score", "final/seconds", "final/passes"]
    assert [row.name for row in rows] == [f"trial {number:04d}" for number in range(10)]
    for row, trial in zip(rows, swept.trials, strict=True):
        assert row.hparams["fit.learning_rate"].number_value == pytest.approx(trial.parameters["fit.learning_rate"])
        assert row.hparams["drop"].bool_value == trial.parameters["drop"]
        assert row.hparams["betas"].string_value == "(0.9, 0.95)"
        scores = {value.name.tag: value.value for value in row.metric_values}
        failed = trial.state == "failed"
        assert row.sessions[0].status == (api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS)
        if not failed:
            assert scores["final/score"] == pytest.approx(trial.last["score"])
            assert scores["final/passes"] == trial.last["epoch"]


def test_every_trial_is_one_run_with_one_point_per_pass_also_after_a_second_call(swept: SweepResult) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = sorted(path for path in Path(swept.folder.path, "tensorboard").rglob("*") if path.is_dir())
    assert [path.name for path in folders] == [f"{number:04d}" for number in range(10)]
    for trial in swept.trials:
        files = list(Path(swept.folder.path, "tensorboard", trial.name).iterdir())
        assert len(files) == 1
        events = EventAccumulator(str(files[0])).Reload()
        if trial.state == "finished":
            points = [(event.step, event.value) for event in events.Scalars("scores/score")]
            assert points == [(line["epoch"], pytest.approx(line["score"])) for line in trial.reports]
            low = [event.value for event in events.Scalars("bounds/score_low")]
            assert low == [pytest.approx(line["score"] - 0.05) for line in trial.reports]


@pytest.mark.browser
def test_the_table_is_there_in_a_browser(swept: SweepResult, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    if not CHROMIUM.exists():
        pytest.skip(f"needs a browser at {CHROMIUM} (apt-get install chromium)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", swept.folder.path, "--port", str(port)]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([*command, "--load_fast=false"], stdout=log, stderr=log)
    try:
        wait_for_server(f"http://localhost:{port}/data/environment", server)
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1600, "height": 900})
            page.goto(f"http://localhost:{port}/#hparams")
            page.get_by_text("trial 0009").first.wait_for(timeout=90_000)
            for column in ("fit.learning_rate", "SIMULATED SIGNALS", "final/score"):
                page.get_by_text(column).first.wait_for(timeout=30_000)
            page.screenshot(path=str(tmp_path / "hparams.png"))
            browser.close()
        assert (tmp_path / "hparams.png").stat().st_size > 20_000
    finally:
        server.terminate()
        server.wait()


def wait_for_server(address: str, server: subprocess.Popen, seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while True:
        assert server.poll() is None, "TensorBoard ended"
        try:
            urllib.request.urlopen(address, timeout=5).read()
            return
        except OSError:
            assert time.monotonic() < until, "TensorBoard never answered"
            time.sleep(0.3)


class Page(HTMLParser):
    """What a page would load from elsewhere, and its headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.identifiers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                self.outside.append(f"{tag} {value}")
            if name == "id" and value:
                self.identifiers.append(value)


def test_the_page_stands_alone_names_simulated_signals_and_escapes_what_trials_said(swept: SweepResult) -> None:
    text = Path(swept.folder.path, "sweep.html").read_text()
    page = Page(text)
    assert page.outside == [] and len(page.identifiers) == len(set(page.identifiers))
    assert text.index("SIMULATED SIGNALS") < text.index("<h1>")
    assert "RuntimeError: &lt;no luck&gt;" in text and "<no luck>" not in text
    best = swept.best
    assert best is not None
    assert f"--checkpoint {swept.folder}/trials/{best.name}/run --trial {best.number}" in text
    # History of both objectives, courses, curve with a line per choice, two slices, parallel coordinates, trade-off.
    assert len(re.findall("<svg ", text)) == 8
    assert "expect less on test subjects" in text


def test_the_terminal_gets_the_best_trials_the_failed_ones_and_the_last_command(swept: SweepResult) -> None:
    text = describe_sweep(swept)
    best = swept.best
    assert best is not None
    assert text.startswith("SIMULATED SIGNALS")
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert rows[0].split()[1] == str(best.number) and len(rows) == 9
    assert "Trial 4 failed: RuntimeError: <no luck>" in text
    assert COMMAND.split("{")[0] in text


def test_the_page_of_a_sweep_that_has_not_finished_anything_can_be_written(tmp_path: Path) -> None:
    def stop_here(trial: Trial) -> None:
        raise RuntimeError(f"not today, {trial.number}")

    result = sweep_by_hand(make_plan("grid", trials=2, max_failures=0), stop_here, tmp_path)
    text = write_sweep_report(result.folder).read_text()
    assert "No trial has finished yet" in text and "not today" in text and "2 trials (2 failed)" in text
    with pytest.raises(StorageError, match="Has the sweep been started"):
        write_sweep_report(tmp_path / "nowhere")


def test_the_curve_of_the_mask_ratio_is_figure_3_with_a_line_per_arm_and_size_and_intervals(tmp_path: Path) -> None:
    tiny = find_preset("tiny")
    plan = SweepPlan(
        space={
            "training_subjects": choice([25, 500]),
            "objective.mask.drop": choice([True, False]),
            "objective.mask.hidden_ratio": choice([0.3, 0.5, 0.7, 0.9]),
        },
        base={"training_subjects": None, "objective": tiny.objective},
        objectives=(Objective(metric="sleep"),),
        sampler="grid",
    )
    trials = []
    for number, parameters in enumerate(list_grid(plan.space)):
        line = {"epoch": 1.0, "seconds": 1.0, "sleep": 0.5, "sleep_low": 0.45, "sleep_high": 0.55}
        trials.append(TrialRecord(number=number, parameters=parameters, state="finished", reports=(line,)))
    settings = plan.describe() | {"trials": 16, "evaluate_command": ""}
    result = SweepResult(folder=open_location(tmp_path), settings=settings, trials=tuple(trials))
    figure = plot_field(result, plan.objectives[0])
    assert figure is not None
    for size in (25, 500):
        for drop in (True, False):
            assert f"training subjects {size}, drop {drop}" in figure
    # Four lines of four points, each point with its interval.
    assert len(re.findall(r'<g id="[^"]*LineCollection_\d+"', figure)) == 4
    assert "hidden ratio" in figure and "sleep" in figure
