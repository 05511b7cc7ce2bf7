"""How long one simulated night takes on one core."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from physioray.data.simulate import list_records, simulate_record


@pytest.mark.benchmark_run
def test_a_full_simulated_night_takes_at_most_six_seconds_of_one_core(tmp_path: Path) -> None:
    records = list_records(subjects=3, hours=7.7, seed=0, unlabelled_share=0.0)
    spent = []
    for record in records:
        start = time.process_time()
        simulate_record(str(tmp_path), record)
        spent.append(time.process_time() - start)
    print(f"\nsimulate: {sorted(spent)[1]:.2f} s of one core per 7.7 h night with 13 channels (limit 6)")
    assert sorted(spent)[1] <= 6.0
