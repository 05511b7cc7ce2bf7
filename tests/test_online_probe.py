"""The probe through the frozen encoder gives what the probe on cached embeddings gives; and neither collapses."""

import numpy as np
import pytest
import torch

from physioray.config import ProbeConfig
from physioray.data.gather import GatherSource, WindowReader
from physioray.embeddings import embed_windows
from physioray.feature_source import CachedFeatures, FeatureSource, OnlineFeatures
from physioray.presets import find_preset
from physioray.pretrain import make_encode
from physioray.probe import balance_accuracy, choose_head, fit_path
from physioray.recipe import RecipeProblem, fit_recipe
from physioray.strategies import build_model
from tests.written_cohorts import write_cohort

TASKS = {"sleep": 5, "age": 2, "arousal": 2}
QUICK = ProbeConfig(recipe_min_steps=25, recipe_passes=1, recipe_batch_size=16, recipe_learning_rate=1e-2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_the_online_probe_gives_the_scores_of_the_cached_one_for_every_task_and_seed(tmp_path):
    """The tiny preset, one modality absent now and then; the largest difference of any score is below 1e-3."""
    cohort = write_cohort(tmp_path, [20] * 6, absent={"emg": 0.3})
    encode = make_encode(build_model(find_preset("tiny").model, 0).encoder, cohort.modalities)
    ids = cohort.find_windows()
    embeddings = embed_windows(encode, GatherSource(cohort, ids, batch_size=64).iterate_all())
    train, validation, test = np.arange(60), np.arange(60, 80), np.arange(80, 120)
    problems = [
        RecipeProblem(labels=embeddings.labels[task], classes=classes, train=train, validation=validation, seed=seed)
        for seed in (0, 1)
        for task, classes in TASKS.items()
    ]
    online = OnlineFeatures(encode, WindowReader(cohort), ids)
    cached = fit_recipe(embeddings.vectors, problems, QUICK)
    live = fit_recipe(online, problems, QUICK)
    assert online.encoded > 2 * QUICK.recipe_min_steps * QUICK.recipe_batch_size  # it did go through the encoder
    through = online.embed(test)
    spread = set()
    for number, (first, second) in enumerate(zip(cached, live, strict=True)):
        truth = problems[number].labels[test]
        scores = [
            balance_accuracy(truth, first.predict(embeddings.vectors[test]).argmax(1)),
            balance_accuracy(truth, second.predict(through).argmax(1)),
        ]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3)
        np.testing.assert_allclose(first.predict(embeddings.vectors[test]), second.predict(through), atol=1e-3)
        spread.add(round(scores[0], 3))
    assert len(spread) > 2  # heads that differ, not one answer for all


def test_both_sources_of_features_measure_and_take_the_same(tmp_path):
    cohort = write_cohort(tmp_path, [90], modalities=("eeg",))
    ids = cohort.find_windows()[::-1].copy()
    reader = WindowReader(cohort)

    def encode(batch):
        return 100.0 + np.stack([batch.signals["eeg"].std(1), batch.signals["eeg"][:, 0]], 1) / 1000.0

    online, cached = OnlineFeatures(encode, reader, ids), CachedFeatures(encode(reader.read(ids)))
    rows = np.arange(0, 90, 7)
    for source in (online, cached):
        assert isinstance(source, FeatureSource) and len(source) == 90
        source.rescale(*cached.measure(np.arange(90)))
    for one, other in zip(online.measure(np.arange(90)), cached.measure(np.arange(90)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)
    np.testing.assert_allclose(online.take(torch.from_numpy(rows)), cached.take(torch.from_numpy(rows)), atol=1e-6)


def make_rare(n=9000, features=32, prevalence=0.027):
    """Embeddings in which 2.7 % of the windows are positive, as arousals are, and faintly so (at best about 0.73)."""
    generator = np.random.default_rng(0)
    labels = (generator.random(n) < prevalence).astype(np.int8)
    hidden = generator.normal(size=(n, features))
    hidden[:, 0] += 1.2 * labels
    return (hidden @ generator.normal(size=(features, features))).astype(np.float32), labels


def score_recipe(steps):
    """Balanced accuracy of ten seeds of the paper's recipe on rare arousals."""
    vectors, labels = make_rare()
    train, validation, test = np.arange(5000), np.arange(5000, 6500), np.arange(6500, 9000)
    problems = [
        RecipeProblem(labels=labels, classes=2, train=train, validation=validation, seed=seed) for seed in range(10)
    ]
    config = ProbeConfig(recipe_min_steps=steps, recipe_passes=1, recipe_batch_size=256)
    heads = fit_recipe(vectors, problems, config)
    return [balance_accuracy(labels[test], head.predict(vectors[test]).argmax(1)) for head in heads]


def test_the_papers_recipe_does_not_collapse_by_seed_on_rare_arousals():
    """Methods 0.7 and 1.9: in the paper five seeds gave 0.637 +- 0.081. Cut short, ours does the same: some seeds stay
    at chance. That is why it takes at least 5,000 steps.
    """
    whole, short = score_recipe(ProbeConfig().recipe_min_steps), score_recipe(800)
    assert np.std(whole, ddof=1) < 0.035 and min(whole) > 0.6, whole
    assert min(short) < 0.52 and np.std(short, ddof=1) > 0.035, short


def test_the_converged_probe_does_not_collapse_on_rare_arousals_whoever_trains_it():
    """The solver draws nothing, so a seed draws who trains: half of the windows each time."""
    vectors, labels = make_rare()
    validation, test = np.arange(5000, 6500), np.arange(6500, 9000)
    scores = []
    for seed in range(10):
        rows = np.sort(np.random.default_rng(seed).permutation(5000)[:2500])
        heads = fit_path(vectors[rows], labels[rows], 2, ProbeConfig().penalties)
        head = choose_head(heads, vectors[validation], labels[validation])
        scores.append(balance_accuracy(labels[test], head.predict(vectors[test]).argmax(1)))
    assert np.std(scores, ddof=1) < 0.035 and min(scores) > 0.6, scores


def test_without_class_weights_rare_arousals_collapse():
    """What the tests above guard against exists: unweighted, the same windows are all called negative."""
    vectors, labels = make_rare()
    plain, weighted = (
        fit_path(vectors[:5000], labels[:5000], 2, [1e-3], class_weights=on)[0].predict(vectors[6500:]).argmax(1)
        for on in (False, True)
    )
    assert balance_accuracy(labels[6500:], plain) < 0.52 and balance_accuracy(labels[6500:], weighted) > 0.65
