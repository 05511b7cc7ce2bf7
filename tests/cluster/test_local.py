"""local.yaml by a real `ray up` onto two test hosts: token, runs and a sweep, a host lost and back, `ray down`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from physioray.sweep_journal import read_sweep
from tests.cluster.filled_files import ROOT, TOKEN
from tests.cluster.kept import keep_pictures, keep_text
from tests.cluster.namespaces import explain_missing
from tests.cluster.two_hosts import SWEEP_TRIALS

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    reason = explain_missing("sshd", "ssh", "ssh-keygen", "rsync", "hostname")
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    isolated = ("unshare", "--net", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child")
    command = [*isolated, sys.executable, "-m", "tests.cluster.two_hosts", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    keep_pictures(folder / "pictures")
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    found = json.loads((folder / "found.json").read_text()) | {"printed": done.stdout}
    keep_text("two-hosts.txt", describe(found))
    return found


def describe(found: dict[str, Any]) -> str:
    """What people want to read of it: the course of events, and `ray status` before, in and after the loss."""
    disturbed, sweep = found["disturbed"], found["sweep"]
    differences = [
        abs(one["loss"] - other["loss"])
        for one, other in zip(found["undisturbed"]["history"], disturbed["history"], strict=False)
    ]
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in disturbed["seconds"].items())
    return "\n".join([
        found["printed"],
        f"From the loss of the host, after {disturbed['passes_before']} passes: {seconds}",
        f"Largest difference of a pass's loss from the undisturbed run: {max(differences, default=float('nan'))}",
        f"Sweep: {sweep['state']} in {sweep['seconds']:.1f} s, trials seen on {', '.join(sweep['hosts'])}",
        sweep["log"][-3000:],
        *(f"--- ray status, {when}\n{text}" for when, text in [
            ("both hosts", found["status"]),
            ("one host lost", disturbed["status_lost"]),
            ("the host is back", disturbed["status_back"]),
        ]),
    ])  # fmt: skip


def test_ray_up_makes_one_cluster_of_both_hosts(found: dict[str, Any]) -> None:
    assert "2 local.cluster.node" in found["status"] and "/4.0 CPU" in found["status"]


def test_without_the_token_nothing_is_told_and_nothing_runs(found: dict[str, Any]) -> None:
    refused = found["without_token"]
    assert refused["/api/jobs/"] == refused["/nodes"] == 401
    assert "AuthenticationError" in refused["submit"]


def test_the_token_is_on_every_host_for_its_owner_alone_and_in_no_output(found: dict[str, Any]) -> None:
    assert found["modes"] == ["0o600", "0o600"]
    assert TOKEN not in json.dumps(found)
    # Logs of Ray, of jobs and of the runs lie in the hosts' folders too.
    assert found["files_with_the_token"] == [f"{home}/.ray/auth_token" for home in ("home", "host1/home", "host2/home")]


def test_two_workers_on_two_hosts_pretrain(found: dict[str, Any]) -> None:
    assert found["undisturbed"]["state"] == "SUCCEEDED"
    assert [record["pass"] for record in found["undisturbed"]["history"]] == list(range(1, 13))


def test_a_submitted_sweep_runs_every_trial_once_and_shares_pretrainings(found: dict[str, Any]) -> None:
    sweep = found["sweep"]
    assert sweep["state"] == "SUCCEEDED", sweep["log"][-3000:]
    # Small trials end in the warm processes of one host before those of the other have started: either, or both.
    assert sweep["hosts"] and set(sweep["hosts"]) <= {"host1", "host2"}
    trials = read_sweep(sweep["out"]).trials
    assert [(trial.number, trial.state) for trial in trials] == [(n, "finished") for n in range(SWEEP_TRIALS)]
    assert all(0 <= trial.last["sleep"] <= 1 and not trial.failures for trial in trials)
    combinations = {tuple(sorted(trial.parameters.items())) for trial in trials}
    assert len(combinations) == SWEEP_TRIALS
    # Trials that differ in the number of labelled subjects alone share a pretraining, whichever host made it.
    shared = {tuple(item for item in key if item[0] != "training_subjects") for key in combinations}
    made = list(Path(sweep["out"]).parent.glob("steps/pretrain/*/done.json"))
    assert len(made) == len(shared) < SWEEP_TRIALS
    assert "sweep.html" in sweep["log"] and Path(sweep["out"], "sweep.html").exists()


@pytest.mark.browser
def test_a_browser_sees_the_running_jobs_the_hosts_and_the_curves(found: dict[str, Any]) -> None:
    if found["no_pictures"]:
        pytest.skip(found["no_pictures"])
    # The browser has waited for the words that must be there (tests/cluster/pictures.py); an empty page is small.
    assert found["pictures_failed"] == []
    for name in ("sweep-jobs", "sweep-cluster", "lost-jobs", "lost-cluster", "tensorboard", "hparams"):
        assert found["pictures"][name] > 20_000, name


def test_a_run_whose_host_is_lost_and_comes_back_ends_with_the_loss_of_an_undisturbed_one(
    found: dict[str, Any],
) -> None:
    disturbed = found["disturbed"]
    assert disturbed["state"] == "SUCCEEDED"
    assert 3 <= disturbed["passes_before"] < 12, "the host must be lost in the middle of the run"
    alone, after = found["undisturbed"]["history"], disturbed["history"]
    assert [record["step"] for record in after] == [record["step"] for record in alone]
    # The same two workers take the same steps from the same checkpoint: the only difference could be the order in
    # which two gradients are added, and a + b is b + a. 1e-6 leaves room for another machine's arithmetic.
    for one, other in zip(alone, after, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert other["loss_by_modality"] == pytest.approx(one["loss_by_modality"], rel=1e-6)


def test_the_host_that_came_back_is_in_the_cluster_again(found: dict[str, Any]) -> None:
    assert "2 local.cluster.node" in found["disturbed"]["status_back"]
    seconds = found["disturbed"]["seconds"]
    assert seconds["noticed"] < seconds["booted"] < seconds["back"]


def test_ray_down_leaves_nothing(found: dict[str, Any]) -> None:
    # Within the time that the laboratory waits; what it saw last is in `left`.
    assert sorted(found["left"]) == ["host1", "host2"]
    assert not any(
        "raylet" in command or "log_monitor" in command for left in found["left"].values() for command in left
    )
