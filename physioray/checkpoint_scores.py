"""Scores one checkpoint under the evaluation protocol: probes at every training-set size, beside the two floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from physioray.config import ProbeConfig
from physioray.data.cohort import Cohort
from physioray.evaluate import Evaluation
from physioray.grid_plan import GridConfig, GridPlan, plan_grid
from physioray.journal import Screen
from physioray.pretrainings import open_pretraining
from physioray.protocol import describe_card, find_labelled_windows
from physioray.results import (
    PREDICTIONS_FILE,
    RESULTS_FILE,
    SUBJECT_SCORES_FILE,
    write_predictions,
    write_results,
    write_subject_scores,
)
from physioray.signals import LookupMiss
from physioray.stages import Description, describe_bands, embed_pretrained, embed_untrained, probe_once
from physioray.steps import StepStore
from physioray.storage import Location, StorageError, as_json


def score_checkpoint(
    place: str,
    cohort: Cohort,
    store: StepStore,
    out: Location,
    *,
    probe: ProbeConfig | None = None,
    other_cohort: bool = False,
    device: torch.device | str = "cpu",
    screen: Screen | None = None,
) -> list[Evaluation]:
    """Probe a pretrained encoder, its untrained twin and band powers at every training-set size, and write the scores.

    Args:
        place: a run's folder or one of its checkpoints.
        cohort: whose labelled subjects are scored.
        store: where embeddings and probes are kept.
        out: folder for results.jsonl, predictions.parquet, subject_scores.parquet, card.json, config.json, notes.json.
        probe: tasks, seeds and solvers; the defaults if None.
        other_cohort: the encoder may come from another cohort.
        device: where the encoder runs.
        screen: where progress is shown.

    Raises:
        StorageError: there is no such checkpoint, it comes from another cohort, it was pretrained on subjects that
            would be scored as unseen, or `out` holds something else.
        LookupMiss: the cohort lacks a modality that the encoder needs.
        ValueError: nobody in the cohort has labels.
    """
    pretraining, identity = open_pretraining(place)
    probe = probe or ProbeConfig()
    plan = plan_grid(cohort, GridConfig(name="evaluate", sizes="tiny", probe=probe))
    check_origin(pretraining.checkpoint, identity, cohort, plan.protocol.splits, other_cohort=other_cohort)
    modalities = tuple(pretraining.model.modalities)
    missing = [name for name in modalities if name not in cohort.modalities]
    if missing:
        raise LookupMiss(
            f"A cohort must hold the encoder's modalities, but {cohort.location} lacks {', '.join(missing)} and has "
            f"{', '.join(cohort.modalities)}. Ingest it with --modalities {','.join(modalities)}."
        )
    config = {**identity, "checkpoint": pretraining.checkpoint.uri, "evaluated_on": cohort.fingerprint}
    _check_folder(out, config)
    windows = find_labelled_windows(cohort, plan.protocol, modalities)
    seed = int(identity["train"]["seed"])
    described = [
        embed_pretrained(store, cohort, windows, pretraining, device=device, screen=screen),
        embed_untrained(store, cohort, windows, pretraining.model, seed, device=device, screen=screen),
        describe_bands(store, cohort, windows, modalities, screen=screen),
    ]
    found = _probe_sizes(store, described, plan, probe, screen)
    write_results(out / RESULTS_FILE, [row for item in found for row in item.scores])
    largest = [item.predictions for number, item in enumerate(found) if (number + 1) % len(plan.sizes) == 0]
    write_predictions(out / PREDICTIONS_FILE, largest)
    write_subject_scores(out / SUBJECT_SCORES_FILE, [item.subject_scores for item in found])
    (out / "notes.json").write_json(list(dict.fromkeys(note for item in found for note in item.notes)))
    (out / "card.json").write_json(describe_card(cohort, plan.protocol))
    (out / "config.json").write_json(config)
    store.refer(out)
    return found


def _check_folder(out: Location, config: Mapping[str, Any]) -> None:
    """Refuse a folder that holds something else than earlier scores of the same checkpoint on the same cohort."""
    place = out / "config.json"
    if not place.exists():
        return
    known, wanted = place.read_json(), as_json(config)
    if any(known.get(name) != wanted[name] for name in ("checkpoint", "evaluated_on", "cohort", "train", "model")):
        raise StorageError(
            f"A folder of scores must be of one checkpoint and one cohort, but {out} holds "
            f"{'the scores of ' + known['checkpoint'] if 'checkpoint' in known else 'a run'}. Nothing was overwritten: "
            "choose another --out; the steps can be shared (--steps)."
        )


def _probe_sizes(
    store: StepStore, described: list[Description], plan: GridPlan, probe: ProbeConfig, screen: Screen | None
) -> list[Evaluation]:
    """Every description at every training-set size, sizes innermost and ascending."""
    found: list[Evaluation] = []
    for description in described:
        for size in plan.sizes:
            if screen is not None:
                note = f"{description.features.replace('_', ' ')}, {size} training subjects"
                screen.update(len(found), len(described) * len(plan.sizes), note)
            found.append(
                probe_once(
                    store,
                    description,
                    plan.cohort,
                    probe,
                    folds=plan.folds_of(size),
                    subsets=None if plan.protocol.folds is not None else {size: plan.subsets[size]},
                    screen=screen,
                )
            )
    if screen is not None:
        screen.update(len(found), len(found))
    return found


def check_origin(
    place: Location, identity: Mapping[str, Any], cohort: Cohort, splits: Sequence[str], *, other_cohort: bool = False
) -> None:
    """Refuse a checkpoint whose scores on this cohort would not be what they are taken for.

    Args:
        place, identity: the checkpoint, and what stands in it: see `pretrainings.open_pretraining`.
        cohort: whose subjects are scored.
        splits: that a pretraining may have seen: see `protocol.Protocol`.
        other_cohort: the checkpoint may come from another cohort.

    Raises:
        StorageError: it comes from another cohort and `other_cohort` is False, or from this one but from subjects
            that the protocol would score as unseen.
    """
    if identity["cohort"] != cohort.fingerprint:
        if other_cohort:
            return
        raise StorageError(
            f"A checkpoint must have been pretrained on the cohort it is evaluated on, but {place} comes from cohort "
            f"{str(identity['cohort'])[:12]} and {cohort.location} is {cohort.fingerprint[:12]}. If that is meant "
            "(transfer to new recordings, none of which it was pretrained on), say --other-cohort."
        )
    strange = sorted(set(identity.get("splits", [])) - set(splits))
    if strange:
        raise StorageError(
            f"A checkpoint must not have been pretrained on subjects that are scored as unseen, but {place} was "
            f"pretrained on the splits {', '.join(strange)} too. Pretrain on {', '.join(splits)}."
        )
