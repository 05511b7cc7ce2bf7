"""Training on a task, from a checkpoint or from scratch, in the loop of pretraining."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from physioray.checkpoint import load_checkpoint
from physioray.config import ProbeConfig
from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource
from physioray.data.splits import Fold
from physioray.embeddings import embed_windows
from physioray.evaluate import Evaluation, evaluate_probe
from physioray.finetune import FinetuneJob, classify_windows, evaluate_finetuning, finetune
from physioray.models.heads import Classifier
from physioray.presets import PRESETS, find_preset
from physioray.pretrain import PretrainJob, load_encoder, make_encode, open_encoder, pretrain
from physioray.probe import ProbeError, weigh_classes
from physioray.results import read_results, write_results
from physioray.score_tables import tabulate_headline
from physioray.storage import StorageError, open_location
from physioray.strategies import find_strategy
from tests.written_cohorts import write_cohort

TINY = find_preset("tiny")
DROPOUT = replace(TINY.model, dropout=0.3)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return write_cohort(tmp_path_factory.mktemp("cohort"), [30, 40, 22, 18, 20, 24], absent={"emg": 0.3, "ecg": 0.2})


@pytest.fixture(scope="module")
def checkpoint(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("pretrained")
    preset = replace(TINY, model=DROPOUT, train=replace(TINY.train, passes=1))
    pretrain(
        PretrainJob.from_strategy(find_strategy("multimae_drop"), preset, cohort=str(cohort.location), out=str(out))
    )
    return str(out / "checkpoints" / "last.pt")


def make_job(cohort: Cohort, out: Path, **changes: object) -> FinetuneJob:
    train = replace(TINY.finetune, **changes.pop("train", {}))  # type: ignore[arg-type]
    if "checkpoint" not in changes:
        changes["model"] = changes.get("model", TINY.model)
    values = {"cohort": str(cohort.location), "out": str(out), "task": "sleep", "train": train, "threads": 1} | changes
    return FinetuneJob(**values)  # type: ignore[arg-type]


def weights_of(out: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    return load_checkpoint(open_location(out / "checkpoints") / name)["model"]


def test_a_frozen_trunk_stays_bit_for_bit_and_embeds_without_dropout(
    cohort: Cohort, checkpoint: str, tmp_path: Path
) -> None:
    finetune(make_job(cohort, tmp_path, checkpoint=checkpoint, frozen=True))
    encoder, after = load_encoder(open_location(checkpoint)), weights_of(tmp_path)
    for name, value in encoder.state_dict().items():
        assert torch.equal(after[f"encoder.{name}"], value), name
    start = Classifier(encoder, 5, frozen=True).train()
    assert start.training and not any(module.training for module in encoder.modules())
    signals = {name: torch.randn(2, 3000) for name in encoder.tokens}
    present = {name: torch.ones(2, dtype=torch.bool) for name in encoder.tokens}
    assert torch.equal(start(signals, present), start(signals, present))
    start(signals, present).sum().backward()
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert start.head.weight.grad is not None


def test_the_head_on_a_frozen_trunk_is_that_on_cached_embeddings(
    cohort: Cohort, checkpoint: str, tmp_path: Path
) -> None:
    result = finetune(make_job(cohort, tmp_path, checkpoint=checkpoint, frozen=True))
    encoder, weights = load_encoder(open_location(checkpoint)), weights_of(tmp_path, "best.pt")
    source = GatherSource(cohort, result.window_id, batch_size=7)
    vectors = np.concatenate([make_encode(encoder, cohort.modalities)(batch) for batch in source.iterate_all()])
    logits = vectors.astype(np.float64) @ weights["head.weight"].double().numpy().T + weights["head.bias"].numpy()
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-4)


def test_a_thawed_trunk_starts_at_the_checkpoint_and_is_trained(
    cohort: Cohort, checkpoint: str, tmp_path: Path
) -> None:
    finetune(make_job(cohort, tmp_path, checkpoint=checkpoint, train={"passes": 1, "learning_rate": 1e-7}))
    encoder, after = load_encoder(open_location(checkpoint)).state_dict(), weights_of(tmp_path)
    moved = [float((after[f"encoder.{name}"] - value).abs().max()) for name, value in encoder.items()]
    assert 0 < max(moved) < 1e-5


def test_training_from_scratch_learns_the_stage_from_the_amplitude(cohort: Cohort, tmp_path: Path) -> None:
    result = finetune(make_job(cohort, tmp_path, train={"passes": 12, "learning_rate": 3e-3}))
    losses = [record["loss"] for record in result.history]
    assert losses[-1] < 0.8 * losses[0]
    true = cohort.read_labels("sleep")[result.window_id]
    recall = [float((result.probabilities.argmax(1)[true == c] == c).mean()) for c in range(5) if (true == c).any()]
    assert np.mean(recall) > 0.35


def test_only_labelled_windows_of_the_right_people_are_used(cohort: Cohort, tmp_path: Path) -> None:
    fold = Fold(train=("rec000", "rec001"), validation=("rec002",), test=("rec003", "rec005"))
    result = finetune(make_job(cohort, tmp_path, fold=fold, train={"passes": 1}))
    assert np.array_equal(result.window_id, cohort.find_windows(subjects=fold.test)) and result.training_subjects == 2
    assert result.probabilities.shape == (len(result.window_id), 5)
    np.testing.assert_allclose(result.probabilities.sum(1), 1)
    identity = load_checkpoint(open_location(tmp_path / "checkpoints") / "last.pt")["identity"]
    assert identity["task"] == "sleep" and identity["evaluation"] == "scratch"


def test_class_weights_are_n_over_classes_times_count_of_the_training_windows(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from physioray import finetune as room

    seen = []

    class Recorded(room.WeightedCrossEntropy):
        def __init__(self, task: str, weights: list[float]) -> None:
            seen.append(weights)
            super().__init__(task, weights)

    monkeypatch.setattr(room, "WeightedCrossEntropy", Recorded)
    fold = Fold(train=("rec001",), validation=("rec002",), test=("rec003",))
    finetune(make_job(cohort, tmp_path / "a", fold=fold, train={"passes": 1}))
    finetune(make_job(cohort, tmp_path / "b", fold=fold, train={"passes": 1}, class_weights=False))
    labels = cohort.read_labels("sleep")[cohort.find_windows(subjects=["rec001"])]
    counts = np.bincount(labels, minlength=5)
    np.testing.assert_allclose(seen[0], [len(labels) / (5 * count) for count in counts])
    np.testing.assert_allclose(seen[0], weigh_classes(labels, 5))
    assert seen[1] == [True] * 5


def test_the_weights_of_the_lowest_validation_loss_are_used_and_resuming_changes_nothing(
    cohort: Cohort, tmp_path: Path
) -> None:
    job = make_job(cohort, tmp_path, train={"passes": 6, "learning_rate": 0.02})
    first, again = finetune(job), finetune(job)
    np.testing.assert_array_equal(first.probabilities, again.probabilities)
    held_out = [record["validation_loss"] for record in first.history]
    best = load_checkpoint(open_location(tmp_path / "checkpoints") / "best.pt")
    assert best["state"]["pass_number"] == 1 + int(np.argmin(held_out))
    model = Classifier(load_encoder_of(best), 5)
    model.load_state_dict(best["model"])
    np.testing.assert_allclose(classify_windows(model, cohort, first.window_id), first.probabilities)
    with pytest.raises(StorageError, match="its task is 'sleep' and not 'arousal'"):
        finetune(replace(job, task="arousal"))


def load_encoder_of(content: dict) -> torch.nn.Module:
    from physioray.strategies import build_model, restore_settings

    return build_model(restore_settings(content["identity"]["trunk"]["model"]), 0).encoder  # type: ignore[arg-type]


def test_people_without_a_label_or_of_one_class_are_a_clear_error(cohort: Cohort, tmp_path: Path) -> None:
    alone = Fold(train=("rec000",), validation=(), test=("rec001",))
    with pytest.raises(ProbeError, match="at least two classes"):
        finetune(make_job(cohort, tmp_path, task="age", fold=alone))


def test_a_subject_in_two_parts_of_a_fold_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    fold = Fold(train=("rec000", "rec001"), validation=("rec001",), test=("rec002",))
    with pytest.raises(StorageError, match="rec001"):
        finetune(make_job(cohort, tmp_path, fold=fold))


def test_a_job_is_either_from_a_checkpoint_or_from_scratch(cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either a checkpoint"):
        make_job(cohort, tmp_path, checkpoint="x.pt", model=TINY.model)
    with pytest.raises(ValueError, match="none to freeze"):
        make_job(cohort, tmp_path, frozen=True)


@pytest.mark.parametrize("strategy", ["scratch", "scratch_ecg"])
def test_folds_are_scored_together_and_stand_in_the_tables(cohort: Cohort, tmp_path: Path, strategy: str) -> None:
    names = cohort.subjects
    folds = {
        seed: [
            Fold(train=names[2:5], validation=(names[5],), test=names[:2]),
            Fold(train=names[:2], validation=(names[5],), test=names[2:5]),
        ]
        for seed in (0, 1)
    }
    model = find_strategy(strategy).fit_model(TINY.model)
    job = make_job(cohort, tmp_path, model=model, train={"passes": 1})
    found = evaluate_finetuning(job, ProbeConfig(tasks=("sleep", "age"), bootstrap_draws=20), folds=folds)
    balanced = [row for row in found.scores if row.metric == "balanced_accuracy" and row.task == "sleep"]
    assert [(row.seed, row.evaluation, row.pretraining, row.features) for row in balanced] == [
        (seed, "scratch", strategy, "untrained") for seed in (0, 1)
    ]
    assert balanced[0].windows == found.predictions.filter(_is("sleep", 0)).num_rows
    assert any(row.task == "aggregate" for row in found.scores)
    write_results(open_location(tmp_path / "results.jsonl"), found.scores)
    table = tabulate_headline(read_results(open_location(tmp_path / "results.jsonl")))
    assert [(row.title, row.subtitle) for row in table.rows] == [("Untrained encoder", "trained from scratch")]


def test_the_grid_of_training_subsets_gives_rows_and_tables_like_the_probes(
    cohort: Cohort, checkpoint: str, tmp_path: Path
) -> None:
    """Finetuning and probes under the same plans: same sizes, scopes, windows and people, so one table holds both."""
    train = cohort.list_subjects("train")
    subsets = {1: train[:1], 25: train}
    config = ProbeConfig(bootstrap_draws=20, seeds=(0,), penalties=(1e-2,))
    job = make_job(cohort, tmp_path, checkpoint=checkpoint, train={"passes": 1})
    tuned = evaluate_finetuning(job, replace(config, tasks=("sleep", "arousal")), subsets=subsets)
    encode = make_encode(load_encoder(open_location(checkpoint)), cohort.modalities)
    embeddings = embed_windows(encode, GatherSource(cohort, cohort.find_windows(), batch_size=50).iterate_all())
    probed = evaluate_probe(
        embeddings,
        cohort,
        replace(config, tasks=("sleep", "arousal")),
        features="pretrained",
        pretraining="multimae_drop",
        subsets=subsets,
        evaluations=("probe_converged",),
    )
    names = ("task", "metric", "split", "scope", "training_subjects", "windows", "subjects", "features", "pretraining")

    def list_keys(found: Evaluation) -> set[tuple[object, ...]]:
        return {tuple(getattr(row, name) for name in names) for row in found.scores if row.seed == 0}

    assert list_keys(tuned) == list_keys(probed)
    assert {row.training_subjects for row in tuned.scores} == {1, len(train)}
    assert {row.scope for row in tuned.scores if row.task == "arousal"} == {"windows", "sleep_windows"}
    assert set(tuned.predictions.column("window_id").to_pylist()) == set(cohort.find_windows(splits=["test"]).tolist())
    assert tuned.subject_scores.num_rows == probed.subject_scores.num_rows > 0
    assert any("25 training subjects were asked for" in note for note in tuned.notes)


def test_a_checkpoint_of_other_modalities_is_refused_with_both_named(checkpoint: str, tmp_path: Path) -> None:
    other = write_cohort(tmp_path / "other", [20] * 5, modalities=("eeg", "airflow"))
    for attempt in (
        lambda: finetune(make_job(other, tmp_path / "out", checkpoint=checkpoint)),
        lambda: open_encoder(open_location(checkpoint), other),
        lambda: finetune(make_job(other, tmp_path / "out")),
    ):
        with pytest.raises(StorageError, match=r"holds eeg, airflow: eog, emg, ecg is missing.*another strategy"):
            attempt()
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_whose_weights_are_of_another_config_is_refused(checkpoint: str, tmp_path: Path) -> None:
    content = load_checkpoint(open_location(checkpoint))
    content["identity"]["model"]["width"] = 64
    torch.save(content, tmp_path / "mixed.pt")
    with pytest.raises(StorageError, match="weights of its own config"):
        load_encoder(open_location(tmp_path / "mixed.pt"))


def _is(task: str, seed: int) -> object:
    import pyarrow.compute as pc

    return (pc.field("task") == task) & (pc.field("seed") == seed)


def test_the_papers_recipe_has_200_passes_and_takes_the_lowest_validation_error() -> None:
    paper = PRESETS["paper"].finetune
    assert (paper.passes, paper.learning_rate, paper.warmup_passes, paper.select) == (200, 1e-4, 10, "best")
