"""Freed memory goes back to the system between the trials of a reused process."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys, threading
import numpy as np
from physioray.memory import give_back_memory, measure_own_memory

kept = []

def work():
    # Pieces too small for a mapping of their own, with something that stays between them, as after any training.
    pieces = [np.ones(12_000) for _ in range(2_000)]
    kept.append(np.ones(1_000))
    pieces.append(np.ones(12_000))

for number in range(int(sys.argv[1])):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if sys.argv[2] == "back":
        give_back_memory()
    print(measure_own_memory(), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what a process holds")
def test_what_a_trial_has_freed_is_given_back() -> None:
    sizes = {}
    for how in ("back", "kept"):
        command = [sys.executable, "-c", PROGRAM, "4", how]
        said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        sizes[how] = [int(line) for line in said.split()]
    print(sizes)
    assert max(sizes["back"]) < max(sizes["kept"]) / 2, "without it, what was freed stays with the process"
    assert max(sizes["back"]) < 1.2 * min(sizes["back"]), "it does not grow from trial to trial"
