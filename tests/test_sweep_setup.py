"""What the sweep experiments set up from their options, their space and the resources that stand in them."""

from pathlib import Path

import pytest

from physioray.distribute import Resources
from physioray.search_space import choice
from physioray.signals import LookupMiss
from physioray.sweep_experiment import OnWorkers, choose_workplace
from physioray.sweep_setup import SweepSetup, choose_rungs, list_evaluations, parse_options, set_up_sweep
from physioray.trials import Here
from tests.written_cohorts import write_cohort


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_cohort(tmp_path_factory.mktemp("set_up") / "cohort", [4] * 10).location.path


def set_up(
    cohort: str, out: Path, monkeypatch: pytest.MonkeyPatch, resources: Resources, *more: str, name: str = "drop"
) -> list[SweepSetup]:
    monkeypatch.setattr("sys.argv", ["x", "--cohort", cohort, "--out", str(out), "--smoke", *more])
    options = parse_options("a sweep")
    space = {f"objective.mask.{name}": choice([True, False])}
    place, threads = choose_workplace(resources), resources.cpus_per_worker
    return [
        set_up_sweep(options, space, evaluation=evaluation, place=place, threads=threads)
        for evaluation in list_evaluations(options)
    ]


@pytest.mark.parametrize(
    ("resources", "place"),
    [
        (Resources(), Here(device="cpu")),
        (Resources(gpus_per_worker=1), Here(device="cuda")),
        (Resources(workers=2, cpus_per_worker=3), OnWorkers(resources=Resources(workers=2, cpus_per_worker=3))),
    ],
)
def test_the_resources_of_an_experiment_say_where_its_trials_work(
    cohort: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resources: Resources, place: Here | OnWorkers
) -> None:
    (setup,) = set_up(cohort, tmp_path / "sweep", monkeypatch, resources)
    plan = setup.run_trial.keywords["plan"]  # type: ignore[attr-defined]
    assert plan.place == place and plan.threads == resources.cpus_per_worker
    assert OnWorkers(resources=Resources(workers=2, gpus_per_worker=1)).device == "cuda"
    assert plan.store == str(tmp_path / "steps")


def test_both_evaluations_have_folders_of_their_own_and_share_the_steps(
    cohort: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setups = set_up(cohort, tmp_path / "sweep", monkeypatch, Resources(), "--evaluation", "both")
    assert [setup.out for setup in setups] == [str(tmp_path / "sweep" / name) for name in ("probe", "finetune")]
    plans = [setup.run_trial.keywords["plan"] for setup in setups]  # type: ignore[attr-defined]
    assert [plan.evaluation for plan in plans] == ["probe", "finetune"]
    assert plans[0].store == plans[1].store
    assert setups[0].plan.inputs["evaluation"] != setups[1].plan.inputs["evaluation"], "they are never mixed"
    # The best of either is scored on test subjects as it was chosen, each into a folder of its own.
    probe, finetune = (setup.plan.evaluate_command for setup in setups)
    assert probe.startswith("physioray evaluate {folder} ") and "/sweep/probe/best" in probe
    assert finetune.startswith("python experiments/finetune.py --checkpoint {folder} ") and "--preset tiny" in finetune
    assert "/sweep/finetune/best" in finetune


def test_a_misspelt_setting_of_an_experiment_names_the_near_ones(
    cohort: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LookupMiss, match=r"Near ones: .*objective\.mask\.drop"):
        set_up(cohort, tmp_path / "sweep", monkeypatch, Resources(), name="dropp")


@pytest.mark.parametrize(("passes", "rungs"), [(25, (2, 8)), (2000, (74, 222, 666)), (2, ()), (3, (1,))])
def test_rungs_are_whole_passes_at_thirds_of_the_end(passes: int, rungs: tuple[int, ...]) -> None:
    assert choose_rungs(passes) == rungs
