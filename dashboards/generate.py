"""Writes physioray.json, the Grafana dashboard of what Ray's own dashboards cannot know: python dashboards/generate.py.

The names of the figures come from physioray/telemetry.py; a test fails when the committed file is another.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

from physioray.telemetry import find_figure

FILE = Path(__file__).parent / "physioray.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")

GPU_SERIES = ("ray_node_gpus_utilization", "ray_node_gram_used")
"""Series that Ray exports where there is a GPU only."""


def series(name: str, **labels: str) -> str:
    """A figure with labels, for one run, cohort or sweep of those chosen above the dashboard."""
    chosen = ", ".join(f'{key}=~"{value}"' for key, value in labels.items())
    return f"{find_figure(name).series}{{{chosen}}}"


def draw(title: str, says: str, unit: str, **queries: str) -> timeseries.Panel:
    """A panel of curves: one query per legend, `{{label}}` in a legend is filled in by Grafana."""
    panel = timeseries.Panel().title(title).description(says).datasource(SOURCE).unit(unit).span(12).height(8)
    for number, (legend, expression) in enumerate(queries.items()):
        target = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id("ABCDEF"[number])
        panel = panel.with_target(target)
    return panel


RUN = {"run": "$run"}
WINDOWS = f"rate({series('physioray_windows', **RUN)}[1m])"
"""Windows per second of every worker of the chosen runs."""


def list_panels() -> list[tuple[str, list[timeseries.Panel]]]:
    """The dashboard's rows, top to bottom."""
    return [
        ("Training", watch_training()),
        ("GPU", watch_gpus()),
        ("Ingest", watch_ingest()),
        ("Sweeps", watch_sweeps()),
    ]


def watch_training() -> list[timeseries.Panel]:
    """Of the chosen runs: speed, waiting, losses, progress."""
    return [
        draw(
            "Windows per second",
            "Windows trained on, over all workers of a run. A window is 30 s of signal.",
            "short",
            **{"{{run}}": f"sum by (run) ({WINDOWS})"},
        ),
        draw(
            "Waiting for data",
            "Share of the pass so far that the first worker spent waiting for its next batch. Above a few per cent the "
            "reading is too slow: more CPUs beside the workers, or shards nearer by.",
            "percentunit",
            **{"{{run}}": f"max by (run) ({series('physioray_wait_share', **RUN)})"},
        ),
        draw(
            "Training loss",
            "Loss of the last pass, over all modalities and by modality.",
            "short",
            **{
                "{{run}} {{modality}}": f"max by (run, modality) ({series('physioray_loss', split='train', **RUN)})",
            },
        ),
        draw(
            "Validation loss",
            "The same on the validation subjects. Rising while the training loss falls: the run overfits.",
            "short",
            **{
                "{{run}} {{modality}}": "max by (run, modality) "
                f"({series('physioray_loss', split='validation', **RUN)})",
            },
        ),
        draw(
            "Share of the run that is done",
            "Steps taken of all planned steps.",
            "percentunit",
            **{
                "{{run}}": f"max by (run) ({series('physioray_steps_done', **RUN)}) / "
                f"max by (run) ({series('physioray_steps_planned', **RUN)})"
            },
        ),
    ]


def watch_gpus() -> list[timeseries.Panel]:
    """What the GPUs do, and what the runs make of their time."""
    return [
        draw(
            "GPU busy",
            "Share of time that a GPU had work. Low with much waiting for data: see above; low without: small batches.",
            "percent",
            **{"{{instance}} GPU {{GpuIndex}}": "avg by (instance, GpuIndex) (ray_node_gpus_utilization)"},
        ),
        draw(
            "Windows per second and busy GPU",
            "All runs together, over the GPUs' busy share: what a GPU makes of its time.",
            "short",
            **{"all": f"sum({WINDOWS}) / (sum(ray_node_gpus_utilization) / 100)"},
        ),
        draw("GPU memory", "Used, in MiB.", "mbytes", **{"{{instance}}": "sum by (instance) (ray_node_gram_used)"}),
    ]


def watch_ingest() -> list[timeseries.Panel]:
    """Of the chosen cohorts: recordings by outcome, and hours."""
    recordings = series("physioray_ingest_recordings", cohort="$cohort")
    return [
        draw(
            "Recordings",
            "Accepted, rejected and waiting. Reasons: physioray info COHORT.",
            "short",
            **{"{{cohort}} {{outcome}}": f"max by (cohort, outcome) ({recordings})"},
        ),
        draw(
            "Hours of signal",
            "Converted so far.",
            "short",
            **{"{{cohort}}": f"max by (cohort) ({series('physioray_ingest_hours', cohort='$cohort')})"},
        ),
    ]


def watch_sweeps() -> list[timeseries.Panel]:
    """Of the chosen sweeps: trials by state, and the best so far."""
    trials = series("physioray_sweep_trials", sweep="$sweep")
    return [
        draw(
            "Trials",
            "By state.",
            "short",
            **{"{{sweep}} {{state}}": f"max by (sweep, state) ({trials})"},
        ),
        draw(
            "Best validation score so far",
            "Of the finished trials.",
            "short",
            **{"{{sweep}}": f"max by (sweep) ({series('physioray_sweep_best', sweep='$sweep')})"},
        ),
    ]


def choose(label: str, figure: str) -> dashboard.QueryVariable:
    """A list above the dashboard of all values of a label."""
    return (
        dashboard.QueryVariable(label)
        .datasource(SOURCE)
        .query(f"label_values({find_figure(figure).series}, {label})")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def generate() -> str:
    """The dashboard as JSON text."""
    board = (
        dashboard.Dashboard("physioray")
        .uid("physioray")
        .tags(["physioray"])
        .description("Training, ingest and sweeps of physioray. Figures of simulated signals say nothing about people.")
        .refresh("10s")
        .time("now-1h", "now")
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(choose("run", "physioray_steps_done"))
        .with_variable(choose("cohort", "physioray_ingest_recordings"))
        .with_variable(choose("sweep", "physioray_sweep_trials"))
    )
    for title, panels in list_panels():
        board = board.with_row(dashboard.Row(title))
        for panel in panels:
            board = board.with_panel(panel)
    return json.dumps(json.loads(JSONEncoder(sort_keys=True).encode(board.build())), indent=1, sort_keys=True) + "\n"


def list_expressions(content: dict[str, Any]) -> dict[str, str]:
    """Every query of a dashboard by its panel's title, variables replaced by what matches everything."""
    found: dict[str, str] = {}
    for panel in content["panels"]:
        for target in [*panel.get("targets", []), *(t for inner in panel.get("panels", []) for t in inner["targets"])]:
            expression = target["expr"]
            for variable in ("$run", "$cohort", "$sweep"):
                expression = expression.replace(variable, ".*")
            found[panel["title"]] = expression
    return found


if __name__ == "__main__":
    FILE.write_text(generate())
