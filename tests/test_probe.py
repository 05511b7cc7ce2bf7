import dataclasses
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from physioray.config import ProbeConfig
from physioray.probe import (
    REFERENCE_WINDOWS,
    LinearHead,
    ProbeError,
    balance_accuracy,
    choose_head,
    fit_path,
    standardise,
    weigh_classes,
)
from physioray.recipe import RecipeProblem, count_recipe_steps, fit_recipe, schedule_rate

PENALTIES = ProbeConfig().penalties


def make_windows(n=300, features=12, classes=5, seed=0):
    """Correlated features of very different spread, unbalanced classes."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(classes, n, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    centres = generator.normal(size=(classes, features))
    mixed = (centres[labels] + 2.0 * generator.normal(size=(n, features))) @ generator.normal(size=(features, features))
    return (mixed * generator.uniform(0.01, 30, features) + 5).astype(np.float32), labels.astype(np.int8)


def fit_reference(features, labels, penalty, classes):
    mean, scale = standardise(features)
    strength = penalty * REFERENCE_WINDOWS / len(labels)
    # scikit-learn fits two classes with one vector, whose penalty is that of two opposite ones at twice the C.
    if classes == 2:
        strength *= 2
    model = LogisticRegression(C=strength, class_weight="balanced", tol=1e-10, max_iter=20000, solver="lbfgs")
    return model.fit((features - mean) / scale, labels).predict_proba((features - mean) / scale)


@pytest.mark.parametrize("classes", [2, 5])
def test_the_converged_solver_agrees_with_scikit_learn_at_every_penalty(classes):
    features, labels = make_windows(classes=classes)
    for head, penalty in zip(fit_path(features, labels, classes, PENALTIES), PENALTIES, strict=True):
        expected = fit_reference(features.astype(np.float64), labels, penalty, classes)
        assert head.penalty == penalty
        np.testing.assert_allclose(head.predict(features.astype(np.float64)), expected, atol=1e-4)


def test_single_precision_for_large_matrices_gives_the_same_probabilities(monkeypatch):
    features, labels = make_windows()
    exact = fit_path(features, labels, 5, PENALTIES)
    monkeypatch.setattr("physioray.probe.FULL_PRECISION_CELLS", 0)
    for head, single in zip(exact, fit_path(features, labels, 5, PENALTIES), strict=True):
        np.testing.assert_allclose(head.predict(features), single.predict(features), atol=2e-3)


def test_the_same_windows_give_the_same_head_bit_for_bit():
    features, labels = make_windows()
    first, second = (fit_path(features, labels, 5, [1e-2])[0] for _ in range(2))
    np.testing.assert_array_equal(first.weight, second.weight)


def test_a_penalty_means_the_same_when_every_window_is_there_ten_times():
    features, labels = make_windows()
    once = fit_path(features, labels, 5, [1e-3])[0]
    tenfold = fit_path(np.tile(features, (10, 1)), np.tile(labels, 10), 5, [1e-3])[0]
    np.testing.assert_allclose(once.predict(features), tenfold.predict(features), atol=1e-4)


def test_features_are_standardised_so_their_unit_does_not_matter():
    features, labels = make_windows()
    factor = np.float32(1000.0)
    plain = fit_path(features, labels, 5, [1e-2])[0].predict(features)
    scaled = fit_path(features * factor, labels, 5, [1e-2])[0].predict(features * factor)
    np.testing.assert_allclose(plain, scaled, atol=1e-4)


def test_a_constant_feature_changes_nothing():
    features, labels = make_windows()
    wider = np.concatenate([features, np.full((len(features), 1), 7.0, np.float32)], 1)
    plain = fit_path(features, labels, 5, [1e-2])[0].predict(features)
    np.testing.assert_allclose(fit_path(wider, labels, 5, [1e-2])[0].predict(wider), plain, atol=1e-4)


def test_class_weights_make_rare_classes_heard():
    labels = np.array([0] * 90 + [1] * 10)
    np.testing.assert_allclose(weigh_classes(labels, 3), [100 / 180, 100 / 20, 0])
    features = np.random.default_rng(0).normal(size=(100, 3)) + 0.5 * labels[:, None]
    weighted = fit_path(features, labels, 2, [1.0])[0].predict(features).argmax(1)
    plain = fit_path(features, labels, 2, [1.0], class_weights=False)[0].predict(features).argmax(1)
    assert (weighted == 1).sum() > 2 * (plain == 1).sum()


def test_a_class_without_training_windows_is_never_predicted():
    features, labels = make_windows()
    kept = labels != 2
    head = fit_path(features[kept], labels[kept], 5, [1e-2])[0]
    probabilities = head.predict(features)
    assert np.all(probabilities[:, 2] == 0)
    np.testing.assert_allclose(probabilities.sum(1), 1)


def test_one_class_or_no_window_is_refused_with_what_was_got():
    features, labels = make_windows()
    with pytest.raises(ProbeError, match="all are of class 3"):
        fit_path(features, np.full_like(labels, 3), 5, [1.0])
    with pytest.raises(ProbeError, match="got none"):
        fit_path(features[:0], labels[:0], 5, [1.0])
    with pytest.raises(ProbeError, match=r"0\.\.1"):
        fit_path(features, labels, 2, [1.0])


def test_the_penalty_is_chosen_by_validation_and_ties_go_to_the_stronger():
    features, labels = make_windows(n=120, features=60)
    validation, truth = make_windows(n=400, features=60, seed=0)
    heads = fit_path(features, labels, 5, PENALTIES)
    scores = [balance_accuracy(truth, head.predict(validation).argmax(1)) for head in heads]
    assert choose_head(heads, validation, truth).penalty == PENALTIES[int(np.argmax(scores))]
    twins = [dataclasses.replace(heads[0], penalty=penalty) for penalty in (1.0, 0.1)]
    assert choose_head(twins, validation, truth).penalty == 0.1
    with pytest.raises(ProbeError, match="validation windows"):
        choose_head(heads, validation[:0], truth[:0])


QUICK = ProbeConfig(recipe_min_steps=60, recipe_passes=1, recipe_batch_size=64, recipe_learning_rate=1e-2)


def make_problem(labels, seed=0, classes=5, split=200):
    rows = np.arange(len(labels))
    return RecipeProblem(labels=labels, classes=classes, train=rows[:split], validation=rows[split:], seed=seed)


def train_with_torch(features, problem, config):
    """The recipe written the ordinary way: autograd, AdamW, one head, last weights."""
    mean, scale = standardise(features[problem.train])
    scaled = torch.from_numpy(((features - mean) / scale).astype(np.float32))
    labels = torch.from_numpy(problem.labels.astype(np.int64))
    layer = torch.nn.Linear(features.shape[1], problem.classes)
    bound = 1 / math.sqrt(features.shape[1])
    drawn = torch.rand((features.shape[1] + 1, problem.classes), generator=torch.Generator().manual_seed(problem.seed))
    drawn = drawn * 2 * bound - bound
    layer.weight.data, layer.bias.data = drawn[:-1].T.clone(), drawn[-1].clone()
    optimiser = torch.optim.AdamW(
        [
            {"params": [layer.weight], "weight_decay": config.recipe_weight_decay},
            {"params": [layer.bias], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    weights = torch.from_numpy(weigh_classes(problem.labels[problem.train], problem.classes).astype(np.float32))
    steps = count_recipe_steps(len(problem.train), config)
    generator, order = np.random.default_rng(problem.seed), np.empty(0, int)
    for step in range(steps):
        while len(order) < config.recipe_batch_size:
            order = np.concatenate([order, generator.permutation(problem.train)])
        rows, order = order[: config.recipe_batch_size], order[config.recipe_batch_size :]
        for group in optimiser.param_groups:
            group["lr"] = schedule_rate(step, steps, config.recipe_learning_rate)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(layer(scaled[rows]), labels[rows], weight=weights).backward()
        optimiser.step()
    return torch.softmax(layer(scaled), 1).detach().numpy()


def test_the_batched_recipe_equals_an_ordinary_training_loop():
    features, labels = make_windows()
    problem = make_problem(labels, seed=3)
    # Without validation windows the last weights are kept, as in the plain loop.
    blind = dataclasses.replace(problem, validation=problem.validation[:0])
    head = fit_recipe(features, [blind], QUICK)[0]
    np.testing.assert_allclose(head.predict(features), train_with_torch(features, blind, QUICK), atol=2e-4)


def test_a_head_is_the_same_alone_and_among_others():
    features, labels = make_windows()
    two = (labels > 2).astype(np.int8)
    problems = [make_problem(labels, 0), make_problem(two, 1, classes=2), make_problem(labels, 2)]
    together = fit_recipe(features, problems, QUICK)
    for problem, head in zip(problems, together, strict=True):
        alone = fit_recipe(features, [problem], QUICK)[0]
        np.testing.assert_allclose(alone.predict(features), head.predict(features), atol=1e-4)
    assert not np.allclose(together[0].weight, together[2].weight)


def test_the_recipe_stops_where_validation_error_was_lowest():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(240, 100)).astype(np.float32)
    labels = generator.integers(0, 2, 240).astype(np.int8)  # nothing to learn: every step overfits
    config = dataclasses.replace(QUICK, recipe_min_steps=400, recipe_learning_rate=3e-2)
    problem = make_problem(labels, classes=2, split=60)
    chosen = fit_recipe(features, [problem], config)[0]
    last = fit_recipe(features, [dataclasses.replace(problem, validation=problem.validation[:0])], config)[0]

    def error(head: LinearHead) -> float:
        return -np.log(head.predict(features[60:])[np.arange(180), labels[60:]]).mean()

    assert error(chosen) < error(last) - 0.2


def test_the_recipe_never_trains_on_rows_without_a_label_and_ignores_classes_it_has_not_seen():
    features, labels = make_windows()
    holed = labels.copy()
    holed[:50] = -1
    problem = RecipeProblem(
        labels=holed, classes=5, train=np.flatnonzero(np.isin(holed, (0, 3, 4))), validation=np.arange(0), seed=0
    )
    head = fit_recipe(features, [problem], QUICK)[0]
    assert np.all(head.predict(features)[:, 1:3] == 0)
    with pytest.raises(ProbeError, match=r"0\.\.4"):
        fit_recipe(features, [dataclasses.replace(problem, train=np.arange(60))], QUICK)


def test_the_recipe_takes_its_passes_but_at_least_the_minimum_and_warms_up_for_a_twentieth():
    config = ProbeConfig()
    assert count_recipe_steps(2000, config) == 5000
    assert count_recipe_steps(512 * 100, config) == 200 * 100
    rates = [schedule_rate(step, 2000, 1e-4) for step in range(2000)]
    assert rates[99] == pytest.approx(1e-4) and rates[0] == pytest.approx(1e-6)
    assert rates[-1] < 1e-9 and max(rates) == pytest.approx(1e-4)


def test_more_steps_bring_the_recipe_to_the_converged_solution():
    features, labels = make_windows(n=600, features=6, classes=2)
    problem = make_problem(labels, classes=2, split=600)
    config = dataclasses.replace(QUICK, recipe_min_steps=1500, recipe_weight_decay=0.0, recipe_batch_size=600)
    recipe = fit_recipe(features, [problem], config)[0]
    converged = fit_path(features, labels, 2, [100.0])[0]
    np.testing.assert_allclose(recipe.predict(features), converged.predict(features), atol=2e-2)
