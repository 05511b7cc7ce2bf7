"""A real `ray up` of local.yaml onto two test hosts, runs, a sweep, a host lost in the middle, and `ray down`.

Called by test_local.py inside namespaces:   python -m tests.cluster.two_hosts FOLDER   writes FOLDER/found.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests
import yaml

from tests.cluster.filled_files import ROOT, TOKEN, fill_local, make_home
from tests.cluster.hosts import Host, prepare_laboratory
from tests.cluster.pictures import Camera, photograph_dashboard, photograph_tensorboard
from tests.written_cohorts import write_cohort

RAY = str(Path(sys.executable).parent / "ray")
DASHBOARD = "http://127.0.0.1:8265"
STARTED = time.monotonic()
PATIENCE = 4
ENDS = ("SUCCEEDED", "FAILED", "STOPPED")


def say(text: str) -> None:
    print(f"{time.monotonic() - STARTED:7.1f} s  {text}", flush=True)


def wait_for(what: str, seconds: float, condition: Callable[[], Any]) -> Any:
    """The first true value of a condition that is asked again and again; on a busy machine all takes longer."""
    seconds *= PATIENCE
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.25)
    raise TimeoutError(f"Waited {seconds} s in vain for: {what}.")


class Laboratory:
    """The user's own machine, two hosts, and the file for `ray up`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        home = make_home(folder / "home")
        (home / ".ssh").mkdir()
        key = str(home / ".ssh" / "cluster")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        public = Path(key + ".pub").read_text()
        self.hosts = [Host(folder, number, public, sys.prefix) for number in (1, 2)]
        config = fill_local(self.hosts[0].address, [self.hosts[1].address], user="root", key=key)
        for name in ("head_start_ray_commands", "worker_start_ray_commands"):
            # Two logical CPUs a host: one trains, one reads. Ray's workers step back behind all other work of a machine
            # (niceness 15), and stand still beside a busy one.
            changed = "ray start --num-cpus=2 --object-store-memory=200000000"
            config[name][1] = "export RAY_worker_niceness=0; " + config[name][1].replace("ray start", changed)
        self.file = folder / "local.yaml"
        self.file.write_text(yaml.safe_dump(config))
        os.environ |= {"HOME": str(home), "TMPDIR": str(folder), "RAY_AUTH_MODE": "token"}
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def ray(self, *command: str, **environment: str) -> str:
        """Run a ray command on the user's machine; what it printed."""
        done = subprocess.run(
            [RAY, *command],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=600,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise RuntimeError(f"ray {' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def status(self) -> str:
        return self.ray("exec", str(self.file), "ray status")

    def count_nodes(self) -> int:
        reply = requests.get(
            f"{DASHBOARD}/nodes?view=summary", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10
        )
        nodes = reply.json()["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def submit(self, name: str, *command: str) -> None:
        self.ray("job", "submit", "--address", DASHBOARD, "--submission-id", name, "--no-wait", "--working-dir", ".",
                 "--", *command)  # fmt: skip

    def job_status(self, name: str) -> str:
        reply = requests.get(
            f"{DASHBOARD}/api/jobs/{name}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10
        ).json()
        return str(reply["status"])

    def job_log(self, name: str) -> str:
        return self.ray("job", "logs", name, "--address", DASHBOARD)


def read_history(run: Path) -> list[dict[str, Any]]:
    file = run / "training.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def try_without_token(laboratory: Laboratory) -> dict[str, Any]:
    """What somebody gets who has reached the port but has no token."""
    found = {path: requests.get(f"{DASHBOARD}{path}", timeout=10).status_code for path in ("/api/jobs/", "/nodes")}
    try:
        laboratory.ray("job", "submit", "--address", DASHBOARD, "--no-wait", "--", "true", RAY_AUTH_MODE="disabled")
        found["submit"] = "accepted"
    except RuntimeError as error:
        found["submit"] = str(error)[-1500:]
    return found


def pretrain(laboratory: Laboratory, name: str, cohort: Path, passes: int) -> Path:
    run = laboratory.folder / "shared" / name
    laboratory.submit(
        name, "python", "experiments/pretrain_strategy.py", "--strategy", "multimae_drop", "--preset", "tiny",
        "--cohort", str(cohort), "--out", str(run), "--passes", str(passes), "--workers", "2", "--spread",
    )  # fmt: skip
    return run


SWEEP_TRIALS = 7


def run_small_sweep(laboratory: Laboratory, camera: Camera) -> dict[str, Any]:
    """A sweep of a few trials over both hosts, submitted as a job; pictures of the dashboard are taken meanwhile."""
    cohort, out = laboratory.folder / "shared" / "labelled", laboratory.folder / "shared" / "sweep"
    write_cohort(cohort, [20] * 15)
    laboratory.submit(
        "sweep", "python", "experiments/sweep_mask_ratio.py", "--cohort", str(cohort), "--out", str(out), "--smoke",
        "--trials", str(SWEEP_TRIALS),
    )  # fmt: skip
    began, hosts, ended = time.monotonic(), set[str](), threading.Event()

    def look() -> None:
        while not ended.wait(0.2):
            for file in out.glob("trials/*/running.json"):
                with suppress(OSError):  # it has just ended
                    text = file.read_text()
                    hosts.update(host.name for host in laboratory.hosts if host.name in text)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        wait_for("the sweep's first trials", 200, lambda: hosts or laboratory.job_status("sweep") in ENDS)
        camera.take(photograph_dashboard, DASHBOARD, TOKEN, "sweep", ["host1", "host2"], name="sweep")
        state = finish(laboratory, "sweep", 400)
    finally:
        ended.set()
        looking.join()
    return {"state": state, "log": laboratory.job_log("sweep"), "hosts": sorted(hosts),
            "seconds": time.monotonic() - began, "out": str(out)}  # fmt: skip


def finish(laboratory: Laboratory, name: str, seconds: float) -> str:
    state = wait_for(
        f"the end of {name}",
        seconds,
        lambda: (s := laboratory.job_status(name)) in ENDS and s,
    )
    return str(state)


def run_disturbed(laboratory: Laboratory, cohort: Path, passes: int, camera: Camera) -> dict[str, Any]:
    """The same run, in which the second host is lost after a few passes and boots again."""
    lost = laboratory.hosts[1]
    run = pretrain(laboratory, "disturbed", cohort, passes)
    wait_for("the first passes", 120, lambda: len(read_history(run)) >= 3)
    began = time.monotonic()
    lost.lose()
    before = len(read_history(run))
    say(f"lost {lost.name} after {before} passes")
    wait_for("the loss being noticed", 120, lambda: laboratory.count_nodes() == 1)
    noticed = time.monotonic() - began
    say(f"noticed after {noticed:.1f} s")
    status_lost = laboratory.status()
    camera.take(photograph_dashboard, DASHBOARD, TOKEN, "disturbed", ["host1", "DEAD"], name="lost")
    lost.start()
    booted = time.monotonic() - began
    say(f"{lost.name} boots after {booted:.1f} s")
    wait_for("the host being taken back", 180, lambda: laboratory.count_nodes() == 2)
    back = time.monotonic() - began
    say(f"taken back after {back:.1f} s")
    wait_for("the run going on", 120, lambda: len(read_history(run)) > before)
    on = time.monotonic() - began
    say(f"the run has finished another pass after {on:.1f} s")
    end = finish(laboratory, "disturbed", 300)
    return {
        "state": end,
        "passes_before": before,
        "seconds": {"noticed": noticed, "booted": booted, "back": back, "going_on": on},
        "status_lost": status_lost,
        "status_back": laboratory.status(),
        "log": laboratory.job_log("disturbed"),
        "history": read_history(run),
    }


def main(folder: Path) -> None:
    prepare_laboratory(folder)
    laboratory = Laboratory(folder)
    # One labelled subject: no probe is fitted, so the run is its pretraining.
    names: list[Any] = ["train", *["pretrain"] * 11]
    cohort = folder / "shared" / "cohort"
    write_cohort(cohort, [24] * 12, splits=names)
    for host in laboratory.hosts:
        host.start()
    say("two hosts are up")
    camera = Camera(folder / "pictures")
    found: dict[str, Any] = {"no_pictures": camera.missing}
    found["up"] = laboratory.ray("up", "-y", "--no-config-cache", "--disable-usage-stats", str(laboratory.file))
    say("ray up has ended")
    tunnel = subprocess.Popen([RAY, "dashboard", str(laboratory.file)], cwd=ROOT, stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        wait_for("the dashboard", 60, lambda: is_reachable())
        wait_for("both hosts in the cluster", 180, lambda: laboratory.count_nodes() == 2)
        say("both hosts are in the cluster")
        found["status"] = laboratory.status()
        found["without_token"] = try_without_token(laboratory)
        passes = 12
        run = pretrain(laboratory, "undisturbed", cohort, passes)
        found["undisturbed"] = {"state": finish(laboratory, "undisturbed", 300), "history": read_history(run)}
        found["undisturbed"]["log"] = laboratory.job_log("undisturbed")
        say("the undisturbed run has ended")
        found["modes"] = [
            oct((host.folder / "home" / ".ray" / "auth_token").stat().st_mode & 0o777) for host in laboratory.hosts
        ]
        found["sweep"] = run_small_sweep(laboratory, camera)
        say("the sweep has ended")
        found["disturbed"] = run_disturbed(laboratory, cohort, passes, camera)
        say("the disturbed run has ended")
        shared = folder / "shared"
        camera.take(photograph_tensorboard, shared / "disturbed")
        camera.take(photograph_tensorboard, shared / "sweep", name="hparams", tab="hparams", show="hidden_ratio")
        found |= {"pictures": camera.list_sizes(), "pictures_failed": camera.failures}
    finally:
        tunnel.terminate()
        found["logs_of_the_head"] = collect_logs(laboratory.hosts[0])
        (folder / "found.json").write_text(json.dumps(found))
    found["down"] = laboratory.ray("down", "-y", str(laboratory.file))
    say("ray down has ended")
    began = time.monotonic()
    # `ray down` stops Ray on the head; a worker that has lost its head ends by itself.
    wait_for("nothing of Ray being left", 200, lambda: not any(list_ray(host) for host in laboratory.hosts))
    found["seconds_to_nothing"] = time.monotonic() - began
    found["left"] = {host.name: host.list_commands() for host in laboratory.hosts}
    say(f"nothing of Ray is left after {found['seconds_to_nothing']:.1f} s more")
    found["files_with_the_token"] = find_token(folder)
    (folder / "found.json").write_text(json.dumps(found))


def find_token(folder: Path) -> list[str]:
    """Files of the hosts, Ray's logs and runs among them, in which the token stands."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and path.stat().st_size]
    return sorted(str(path.relative_to(folder)) for path in files if TOKEN.encode() in path.read_bytes())


def list_ray(host: Host) -> list[str]:
    """What still runs of Ray on a host, or of a job."""
    return [command for command in host.list_commands() if "ray" in command.replace(str(host.folder), "")]


def is_reachable() -> bool:
    try:
        return requests.get(f"{DASHBOARD}/", timeout=5).ok
    except requests.RequestException:
        return False


def collect_logs(host: Host) -> str:
    """What the autoscaler on the head wrote."""
    return "".join(
        path.read_text()[-4000:] for path in sorted((host.folder / "tmp_ray").glob("session_*/logs/monitor.*"))
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
