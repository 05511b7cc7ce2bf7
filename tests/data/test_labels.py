"""Stages, arousals and ages per window: the challenge's two forms of one scoring, and its published events."""

from __future__ import annotations

import csv
import gzip
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from physioray.config import AROUSAL_RULES, ArousalRule
from physioray.data.labels import (
    find_stage,
    label_age,
    label_from_file,
    label_from_scoring,
    label_stages,
    make_unlabelled,
    mark_arousals,
    parse_event_rows,
    parse_notes,
)
from physioray.data.records import ArousalFile, RecordEntry, RejectedRecording, read_annotations, read_arousal_file
from physioray.signals import STAGES, LookupMiss
from physioray.storage import Location, open_location

RATE = 10.0
LENGTH = 300
"""Samples of a window at `RATE`."""


@pytest.mark.parametrize(
    ("name", "stage"),
    [("W", "W"), ("Wake", "W"), ("n1", "N1"), ("S2", "N2"), ("N3", "N3"), ("S4", "N3"), ("R", "REM"), ("REM", "REM")],
)
def test_a_stage_is_known_by_each_of_its_names(name: str, stage: str) -> None:
    assert STAGES[find_stage(name)] == stage


def test_an_unknown_stage_name_lists_those_that_exist() -> None:
    assert find_stage("?") == -1
    with pytest.raises(LookupMiss, match=r"one of W, Wake, .* but got 'N7'"):
        find_stage("N7")


def test_a_stage_lasts_to_the_next_note_or_to_the_end_and_is_unknown_before_the_first() -> None:
    scoring = parse_notes([(LENGTH, "W"), (2 * LENGTH, "N2"), (4 * LENGTH, "R")], 6 * LENGTH)
    assert label_stages(scoring, RATE, 6).tolist() == [-1, 0, 2, 2, 4, 4]


def test_a_stage_note_outside_the_vocabulary_rejects_the_recording() -> None:
    with pytest.raises(RejectedRecording, match=r"got 'X9'\. It stands at sample 300"):
        parse_notes([(0, "W"), (300, "X9")], 900)


def test_an_annotation_past_the_end_rejects_the_recording() -> None:
    with pytest.raises(RejectedRecording, match="900 samples, but 'N1' stands at 901"):
        parse_notes([(0, "W"), (901, "N1")], 900)
    assert len(parse_notes([(0, "W"), (900, "resp_hypopnea)")], 900).warnings) == 1


def test_brackets_without_a_partner_are_warned_of() -> None:
    scoring = parse_notes([(10, "(arousal_rera"), (50, "resp_hypopnea)")], 900)
    assert scoring.events == ()
    assert scoring.warnings == (
        "an event resp_hypopnea ends at sample 50 but never begins",
        "an event arousal_rera begins at sample 10 but never ends",
    )


def test_target_arousal_reaches_from_2_s_before_to_10_s_after_a_rera_and_2_s_after_others() -> None:
    scoring = parse_notes(
        [(0, "N2"), (500, "(arousal_rera"), (560, "arousal_rera)"), (1000, "(arousal_plm"), (1030, "arousal_plm)")],
        1500,
    )
    marks = mark_arousals(scoring, 1500, RATE)
    assert np.flatnonzero(marks == 1).tolist() == [*range(479, 660), *range(979, 1050)]
    assert not (marks == -1).any()


def test_samples_near_waking_and_breathing_events_are_not_scored_even_within_an_arousal() -> None:
    notes = [(0, "N2"), (500, "(arousal_rera"), (520, "(resp_hypopnea"), (540, "resp_hypopnea)")]
    notes += [(560, "arousal_rera)"), (1200, "W"), (1500, "N1")]
    marks = mark_arousals(parse_notes(notes, 2000), 2000, RATE)
    assert np.flatnonzero(marks == 1).tolist() == [*range(640, 660)]
    assert np.flatnonzero(marks == -1).tolist() == [*range(419, 640), *range(1098, 1599)]


def _file(target: list[tuple[int, int]], unscored: list[tuple[int, int]], windows: int = 4) -> ArousalFile:
    arousals, stages = (np.zeros(windows * LENGTH, np.int8) for _ in range(2))
    for start, stop in target:
        arousals[start:stop] = 1
    for start, stop in unscored:
        arousals[start:stop] = -1
    stages[:] = 2
    stages[: LENGTH - 1] = -1
    return ArousalFile(arousals=arousals, stages=stages)


def _arousals(file: ArousalFile, rule: ArousalRule) -> list[int]:
    return label_from_file(file, len(file.arousals), RATE, len(file.arousals) // LENGTH, rule).arousal.tolist()


def test_each_arousal_rule_counts_as_it_says() -> None:
    # Window w holds the file's samples from 300 w - 1 on: 224, 225 and 1 target samples in windows 1 to 3.
    file = _file([(299, 299 + 224), (599, 599 + 225), (899, 900)], [])
    assert _arousals(file, ArousalRule()) == [-1, 0, 1, 0]
    assert _arousals(file, AROUSAL_RULES["majority"]) == [-1, 1, 1, 0]
    assert _arousals(file, AROUSAL_RULES["any"]) == [-1, 1, 1, 1]


def test_windows_with_samples_that_are_not_scored_are_negative_or_unknown() -> None:
    file = _file([(600, 850)], [(300, 301)])
    assert _arousals(file, ArousalRule()) == [-1, 0, 1, 0]
    assert _arousals(file, ArousalRule(unscored="drop")) == [-1, -1, 1, 0]


def test_the_boundary_of_the_file_stands_one_sample_early() -> None:
    file = _file([], [])
    file.stages[599:] = 4
    labels = label_from_file(file, 1200, RATE, 4, ArousalRule())
    assert labels.sleep.tolist() == [-1, 2, 4, 4]


def test_shares_are_of_samples_in_windows_with_a_stage() -> None:
    labels = label_from_file(_file([(0, 100), (299, 389)], [(599, 1199)]), 1200, RATE, 4, ArousalRule())
    assert labels.arousal_sample_share == pytest.approx(0.1)
    assert labels.unscored_sample_share == pytest.approx(2 / 3)


def test_an_arousal_file_of_another_length_rejects_the_recording() -> None:
    with pytest.raises(RejectedRecording, match="1201 samples, but has 1200"):
        label_from_file(_file([], []), 1201, RATE, 4, ArousalRule())


def test_arousals_are_unknown_where_nothing_but_stages_was_noted() -> None:
    stages_only = parse_notes([(0, "N2")], 900)
    assert label_from_scoring(stages_only, 900, RATE, 3, ArousalRule()).arousal.tolist() == [-1, -1, -1]
    with_event = parse_notes([(0, "N2"), (700, "(resp_hypopnea"), (720, "resp_hypopnea)")], 900)
    assert label_from_scoring(with_event, 900, RATE, 3, ArousalRule()).arousal.tolist() == [0, 0, 0]


def test_the_duration_of_a_stage_in_a_table_of_events_is_not_believed() -> None:
    scoring = parse_event_rows([(0.0, 30.0, "Wake"), (30.0, 30.0, "REM"), (40.0, 5.0, "arousal_rera")], RATE)
    assert label_stages(scoring, RATE, 4).tolist() == [0, 4, 4, 4]
    assert (scoring.events[0].start, scoring.events[0].stop) == (400, 450)


def test_age_is_older_from_the_threshold_on() -> None:
    assert [label_age(age, 55.0, 1).item() for age in (54.9, 55.0, None)] == [0, 1, -1]


def test_an_unlabelled_recording_knows_nothing() -> None:
    labels = make_unlabelled(2)
    assert labels.sleep.tolist() == labels.arousal.tolist() == [-1, -1]


def _open_real_labels() -> Location:
    if "PHYSIORAY_REAL_DATA" not in os.environ:
        pytest.skip("PHYSIORAY_REAL_DATA does not name a folder with real recordings")
    return open_location(Path(os.environ["PHYSIORAY_REAL_DATA"]) / "cinc2018_labels")


def _read_events(place: Location) -> dict[str, list[tuple[float, float, str]]]:
    events = defaultdict(list)
    with gzip.open(f"{place.path}/all_events.tsv.gz", "rt") as table:
        for row in csv.DictReader(table, delimiter="\t"):
            events[row["record"]].append((float(row["onset"]), float(row["duration"]), row["trial_type"]))
    return events


@pytest.mark.real
def test_real_notes_give_the_real_label_files_window_by_window() -> None:
    place = _open_real_labels()
    for name in ("tr03-0005", "tr03-0029"):
        entry = RecordEntry(name=name, path=name)
        file, notes = read_arousal_file(place, entry), read_annotations(place, entry, 200.0)
        assert file is not None and notes is not None
        samples = len(file.arousals)
        scoring = parse_notes(notes, samples)
        assert np.array_equal(mark_arousals(scoring, samples, 200.0), file.arousals)
        for rule in (*AROUSAL_RULES.values(), ArousalRule(unscored="drop")):
            one = label_from_file(file, samples, 200.0, samples // 6000, rule)
            two = label_from_scoring(scoring, samples, 200.0, samples // 6000, rule)
            assert np.array_equal(one.sleep, two.sleep) and np.array_equal(one.arousal, two.arousal)
            assert (one.arousal_sample_share, one.unscored_sample_share) == (
                two.arousal_sample_share,
                two.unscored_sample_share,
            )
        assert (one.sleep >= 0).sum() == {"tr03-0005": 845, "tr03-0029": 777}[name]


@pytest.mark.real
def test_published_events_give_all_eight_real_label_files() -> None:
    place = _open_real_labels()
    events = _read_events(place)
    names = sorted(
        item.name.removesuffix("-arousal.mat") for item in place.list() if item.name.endswith("-arousal.mat")
    )
    assert len(names) == 8
    for name in names:
        file = read_arousal_file(place, RecordEntry(name=name, path=name))
        assert file is not None
        samples = len(file.arousals)
        scoring = parse_event_rows(events[name], 200.0)
        one = label_from_file(file, samples, 200.0, samples // 6000, ArousalRule())
        two = label_from_scoring(scoring, samples, 200.0, samples // 6000, ArousalRule())
        assert np.array_equal(mark_arousals(scoring, samples, 200.0), file.arousals), name
        assert np.array_equal(one.sleep, two.sleep) and np.array_equal(one.arousal, two.arousal), name


@pytest.mark.real
def test_published_events_give_the_check_totals_of_all_994_records() -> None:
    place = _open_real_labels()
    with open(f"{place.path}/durations.csv") as table:
        samples = {row["record"]: round(float(row["duration_s"]) * 200) + 1 for row in csv.DictReader(table)}
    events = _read_events(place)
    totals, windows, leading = np.zeros(6, np.int64), 0, {}
    for name, rows in events.items():
        count = samples[name] // 6000
        stages = label_stages(parse_event_rows(rows, 200.0), 200.0, count)
        totals += np.bincount(stages + 1, minlength=6)
        windows += count
        leading[name] = int(np.argmax(stages >= 0))
    assert (len(events), windows) == (994, 919_246)
    assert totals[1:].tolist() == [157_945, 136_978, 377_821, 102_592, 116_864]
    assert totals[1:].sum() == 892_200
    # Scored from the first sample in the challenge's own files, but without a note there: 62 windows in all,
    # 49 N2 and 13 REM, are what these totals lack to the 892,262 of the label files.
    assert [leading[name] for name in ("tr03-0314", "tr05-0326", "tr07-0602")] == [13, 47, 2]


def test_only_arousals_and_breathing_events_say_that_arousals_were_looked_for() -> None:
    samples = 10 * 6000
    stages = [(6000, "N2"), (12000, "W")]
    for pair, known in (("foo", False), ("resp_hypopnea", True), ("arousal_rera", True)):
        notes = sorted([*stages, (8000, f"({pair}"), (9000, f"{pair})")])
        labels = label_from_scoring(parse_notes(notes, samples), samples, 200.0, 10, ArousalRule())
        assert bool((labels.arousal >= 0).any()) is known, pair
