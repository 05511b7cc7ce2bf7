"""From checkpoints to figures: any strategy, absent modalities, any number of readers, and a page of its own."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from physioray.analysis import AnalysisJob, AnalysisSums, analyse, find_checkpoint, measure, merge_sums, summarise
from physioray.analysis_config import AnalysisConfig
from physioray.analysis_figures import render_png
from physioray.analysis_page import PAGE_FILE, draw_all, render_fragment, tabulate_rollout, write_page
from physioray.analysis_results import Analysis, load_analysis
from physioray.data.cohort import Cohort
from physioray.finetune import FinetuneJob, finetune
from physioray.presets import find_preset
from physioray.pretrain import PretrainJob, pretrain
from physioray.signals import LookupMiss
from physioray.storage import StorageError, open_location
from physioray.strategies import find_strategy
from tests.written_cohorts import write_cohort

TINY = find_preset("tiny")
NAMES = ("eeg", "emg", "airflow")
SETTINGS = AnalysisConfig(windows=24, contexts=3, draws=5, batch_size=7, bootstrap_draws=20, examples=2)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    folder = tmp_path_factory.mktemp("cohort")
    return write_cohort(folder, [9, 8, 7, 10, 6, 9, 7, 8, 9, 10], modalities=NAMES, absent={"emg": 0.3})


@pytest.fixture(scope="module")
def runs(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    preset = replace(TINY, train=replace(TINY.train, passes=1))
    for name in ("multimae_drop", "clip_pairwise"):
        found[name] = tmp_path_factory.mktemp(name)
        places = {"cohort": str(cohort.location), "out": str(found[name]), "keep_passes": (0,), "threads": 1}
        pretrain(PretrainJob.from_strategy(find_strategy(name), preset, **places))
    found["scratch"] = tmp_path_factory.mktemp("scratch")
    model = replace(TINY.model, modalities=NAMES)
    places = {"cohort": str(cohort.location), "out": str(found["scratch"]), "threads": 1}
    finetune(FinetuneJob(task="sleep", model=model, train=replace(TINY.finetune, passes=1), **places))
    return found


@pytest.fixture(scope="module")
def analyses(cohort: Cohort, runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Analysis]:
    out = open_location(str(tmp_path_factory.mktemp("kept")))
    places = {"untrained": runs["multimae_drop"] / "checkpoints" / "pass-0000.pt", **runs}
    return [analyse(make_job(name, path, cohort), out / name) for name, path in places.items()]


def make_job(name: str, path: Path, cohort: Cohort, config: AnalysisConfig = SETTINGS) -> AnalysisJob:
    return AnalysisJob(name=name, checkpoint=str(path), cohort=str(cohort.location), config=config)


def test_checkpoints_of_every_kind_are_explained(analyses: list[Analysis]) -> None:
    kinds = [item.facts["strategy"] for item in analyses]
    assert kinds == ["untrained", "multimae_drop", "clip_pairwise", "scratch, scratch on sleep"]
    for item in analyses:
        assert item.simulated and item.grid.names == NAMES and item.maps.shape == (3, 90, 90)
        np.testing.assert_allclose(np.nansum(item.maps[-1][:30, :30], 1) > 0, True)
        reconstructs = item.name in ("untrained", "multimae_drop")
        assert (item.find("reconstruction_relative", "whole") is not None) == reconstructs == bool(item.examples)
        undefined = {n.quantity for n in item.numbers if n.value is None}
        assert undefined <= {"attention_alignment"} and (undefined == set()) == (item.name != "clip_pairwise")
    assert any("One encoder per modality" in note for note in analyses[2].notes)
    assert not any("Pretraining saw" in note for note in analyses[1].notes)


def test_windows_that_pretraining_has_seen_are_called_so(cohort: Cohort, runs: dict[str, Path]) -> None:
    small = replace(SETTINGS, splits=("train",), windows=3, contexts=1, draws=2, examples=0)
    for file, seen in (("last.pt", True), ("pass-0000.pt", False)):
        job = make_job("seen", runs["multimae_drop"] / "checkpoints" / file, cohort, small)
        assert any("Pretraining saw the signals of the train" in note for note in analyse(job).notes) == seen


def test_windows_come_from_held_out_people_first_and_all_their_recordings(analyses: list[Analysis]) -> None:
    counts = analyses[0].facts["windows"]
    assert list(counts) == ["test", "validation"] and sum(counts.values()) == 24
    assert analyses[0].find("attention_entropy", "rollout").subjects == 4


@pytest.mark.parametrize("kind", ["multimae_drop", "clip_pairwise"])
def test_two_readers_find_what_one_finds(
    cohort: Cohort, runs: dict[str, Path], analyses: list[Analysis], kind: str
) -> None:
    job = make_job(kind, runs[kind], cohort)
    both = summarise(job, merge_sums([measure(job, rank=rank, world_size=2) for rank in (1, 0)]))
    alone = next(item for item in analyses if item.name == kind)
    assert both.identity == alone.identity and list(both.examples) == list(alone.examples)
    np.testing.assert_allclose(both.maps, alone.maps, atol=1e-5)
    for one, other in zip(both.numbers, alone.numbers, strict=True):
        assert (one.quantity, one.windows, one.subjects) == (other.quantity, other.windows, other.subjects)
        for key in ("value", "low", "high", "unit_low"):
            mine, theirs = (np.nan if getattr(n, key) is None else getattr(n, key) for n in (one, other))
            assert mine == pytest.approx(theirs, rel=2e-3, abs=1e-5, nan_ok=True), one


def test_what_was_found_is_kept_whole_and_measured_again_only_if_something_changed(
    cohort: Cohort, runs: dict[str, Path], tmp_path: Path
) -> None:
    small = replace(SETTINGS, windows=4, contexts=1, draws=2, examples=1)
    job, folder, calls = make_job("one", runs["multimae_drop"], cohort, small), open_location(str(tmp_path)), []

    def count(job: AnalysisJob) -> AnalysisSums:
        calls.append(job)
        return measure(job)

    first, again = (analyse(job, folder, run_measure=count) for _ in range(2))
    assert len(calls) == 1
    assert again.numbers == first.numbers and again.facts == first.facts and again.notes == first.notes
    np.testing.assert_array_equal(again.maps, first.maps)
    for name, example in first.examples[next(iter(first.examples))].items():
        np.testing.assert_array_equal(again.examples[next(iter(again.examples))][name].output, example.output)
    analyse(replace(job, config=replace(small, draws=3)), folder, run_measure=count)
    assert len(calls) == 2
    (tmp_path / "arrays.npz").write_bytes(b"")
    with pytest.raises(StorageError, match="holds none"):
        load_analysis(folder)
    analyse(job, folder, run_measure=count)
    assert len(calls) == 3


def test_a_runs_folder_means_the_checkpoint_it_is_judged_by(runs: dict[str, Path], tmp_path: Path) -> None:
    assert find_checkpoint(str(runs["multimae_drop"])).name == "last.pt"
    for name in ("clip_pairwise", "scratch"):  # the second has no config.json
        assert find_checkpoint(str(runs[name])).name == "best.pt"
    assert find_checkpoint(str(runs["clip_pairwise"] / "checkpoints" / "pass-0000.pt")).name == "pass-0000.pt"
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(StorageError, match="Has the run finished a pass"):
        find_checkpoint(str(tmp_path))


def test_an_unknown_quantity_is_answered_with_those_that_exist(analyses: list[Analysis]) -> None:
    with pytest.raises(LookupMiss, match=r"attention_off_modality.*source_variance_share"):
        analyses[0].trace("attention_of_modality")


def test_the_page_stands_alone_with_every_number_and_says_that_signals_are_simulated(
    analyses: list[Analysis], tmp_path: Path
) -> None:
    analyses = [analyses[1], analyses[2]]
    page = Path(write_page(analyses, open_location(str(tmp_path))).path)
    text = page.read_text()
    assert page.name == PAGE_FILE and text.count("<svg") == len(draw_all(analyses))
    assert "http://" not in text.replace("http://www.w3.org", "") and "<script" not in text
    assert text.startswith("<!doctype html>") and "SIMULATED SIGNALS" in text.split("<h2>")[0]
    headings = [heading.split("</h2>")[0].split("</h3>")[0] for heading in re.split("<h[23]>", text)[1:-1]]
    assert len(headings) > 4 and all(re.search(r"\(SIMULATED signals, \d+ people\)", heading) for heading in headings)
    for analysis in analyses:
        assert f"{analysis.find('attention_entropy', 'rollout').value:.3f}" in text
    table = pq.ParquetFile(tmp_path / "numbers.parquet", pre_buffer=False).read(use_threads=False)
    assert len(table) == sum(len(item.numbers) for item in analyses)
    assert set(table.column("simulated").to_pylist()) == {True}
    pictures = {path.suffix for path in (tmp_path / "pictures").iterdir()}
    assert pictures == {".svg", ".png"} and (tmp_path / "pictures" / "rollout.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="its own name"):
        write_page([analyses[0], analyses[0]], open_location(str(tmp_path)))


def test_the_reference_row_is_left_out_where_checkpoints_have_none_in_common(analyses: list[Analysis]) -> None:
    deeper = replace(analyses[0], name="deeper", numbers=[replace(n, reference=0.5) for n in analyses[0].numbers])
    assert tabulate_rollout(analyses).reference is not None
    assert tabulate_rollout([analyses[0], deeper]).reference is None


def test_without_a_masked_autoencoder_there_is_no_picture_of_reconstructions(analyses: list[Analysis]) -> None:
    apart = [analyses[2]]
    assert {drawing.section for drawing in draw_all(apart)} == {"rollout", "attention", "layers", "source_variance"}
    assert "only masked autoencoders do" in render_fragment(apart)
    with pytest.raises(ValueError, match="at least one checkpoint"):
        render_fragment([])


def test_a_picture_is_the_same_every_time(analyses: list[Analysis]) -> None:
    one, other = (next(d for d in draw_all(analyses[:1]) if d.section == "source_variance") for _ in range(2))
    assert one.svg() == other.svg() and render_png(one.figure) == render_png(other.figure)


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_of_a_cluster_find_what_one_process_finds(
    cohort: Cohort, runs: dict[str, Path], analyses: list[Analysis]
) -> None:
    from physioray.distribute import join_cluster
    from physioray.spread import measure_on_cluster

    job, told = make_job("multimae_drop", runs["multimae_drop"], cohort), []

    class Screen:
        def update(self, done: int, total: int, note: str = "") -> None:
            told.append((done, total, bool(note)))

        def say(self, text: str) -> None:
            raise AssertionError(text)

    with join_cluster(cpus=2):
        both = summarise(job, measure_on_cluster(job, 2, screen=Screen()))
        with pytest.raises(StorageError, match="A checkpoint must stand at"):
            measure_on_cluster(replace(job, checkpoint="/nowhere.pt"), 1)
    assert told == [(1, 2, True), (2, 2, True)]
    np.testing.assert_allclose(both.maps, analyses[1].maps, atol=1e-5)
