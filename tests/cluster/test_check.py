"""What the check of cluster files finds before money is spent; nothing leaves the machine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.check import check_file, main
from tests.cluster.filled_files import CLUSTER, ROOT, fill_aws, fill_local, make_home

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_home(tmp_path / "home")
    monkeypatch.setenv("HOME", str(folder))
    return folder


def check(config: dict[str, Any], folder: Path) -> list[str]:
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(config))
    return check_file(path, root=ROOT)


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


@pytest.mark.parametrize("name", ["aws.yaml", "local.yaml", "kuberay.yaml"])
def test_a_file_as_published_fails_for_its_placeholders_and_nothing_else(name: str) -> None:
    problems = check_file(CLUSTER / name, root=ROOT)
    assert problems and all("must be filled in" in problem for problem in problems), problems


def test_filled_in_files_have_nothing_to_mend(tmp_path: Path) -> None:
    assert check(fill_aws(), tmp_path) == []
    assert check(fill_local("10.0.0.1", ["10.0.0.2"]), tmp_path) == []
    text = (
        (CLUSTER / "kuberay.yaml").read_text().replace("REPLACE-BUCKET", "nights").replace("REPLACE-REGISTRY", "here")
    )
    assert check(yaml.safe_load(text), tmp_path) == []


def machine(config: dict[str, Any], name: str = "train-g5") -> dict[str, Any]:
    return config["available_node_types"][name]["node_config"]


def let_dashboard_out(config: dict[str, Any]) -> None:
    config["head_start_ray_commands"][1] += " --dashboard-host=0.0.0.0"


def forget_token(config: dict[str, Any]) -> None:
    config["worker_start_ray_commands"][1] = "ray start --address=$RAY_HEAD_IP:6379"


WRONG: list[tuple[str, Change]] = [
    ("ImageId must be a pinned image", lambda c: machine(c).update(ImageId="latest_dlami")),
    ('Unknown parameter in input: "InstanceTypo"', lambda c: machine(c).update(InstanceTypo="x")),
    ('VolumeTyp"', lambda c: machine(c)["BlockDeviceMappings"][0]["Ebs"].update(VolumeTyp="gp3")),
    ("Invalid type for parameter", lambda c: machine(c)["BlockDeviceMappings"][0]["Ebs"].update(VolumeSize="300")),
    ("a disk's Encrypted must be True", lambda c: machine(c)["BlockDeviceMappings"][0]["Ebs"].pop("Encrypted")),
    ("(IMDSv2)", lambda c: machine(c).pop("MetadataOptions")),
    ("port 22 is open to the world", lambda c: machine(c, "head").pop("SecurityGroupIds")),
    ("cannot read the bucket", lambda c: machine(c, "ingest").pop("IamInstanceProfile")),
    ("head must be on demand", lambda c: machine(c, "head").update(machine(c, "ingest"))),
    ("head must have CPU: 0", lambda c: c["available_node_types"]["head"].update(resources={})),
    ("Ray's rules", lambda c: c.update(max_worker=3)),
    ("Ray's rules", lambda c: c["available_node_types"]["ingest"].pop("resources")),
    ("min_workers must not be above", lambda c: c["available_node_types"]["ingest"].update(min_workers=5)),
    ("cache_stopped_nodes must be false", lambda c: c["provider"].pop("cache_stopped_nodes")),
    ("idle_timeout_minutes must be set", lambda c: c.update(idle_timeout_minutes=0)),
    ("keep the dashboard on 127.0.0.1", let_dashboard_out),
    ("worker_start_ray_commands must set RAY_AUTH_MODE=token", forget_token),
    ("must bring ~/.ray/auth_token", lambda c: c["file_mounts"].pop("~/.ray/auth_token")),
    ("file_mounts must exist here", lambda c: c["file_mounts"].update({"~/x": "./nowhere"})),
    ("looks like one", lambda c: c["setup_commands"].append("export RAY_AUTH_TOKEN=abc")),
]


@pytest.mark.parametrize(("problem", "change"), WRONG, ids=[text for text, _ in WRONG])
def test_what_would_cost_money_or_stand_open_is_named(problem: str, change: Change, tmp_path: Path) -> None:
    config = copy.deepcopy(fill_aws())
    change(config)
    assert any(problem in found for found in check(config, tmp_path))


def test_a_token_that_others_can_read_or_that_is_absent_is_named(home: Path, tmp_path: Path) -> None:
    token = home / ".ray" / "auth_token"
    token.chmod(0o644)
    assert any("chmod 600" in problem for problem in check(fill_aws(), tmp_path))
    token.unlink()
    assert any("ray get-auth-token --generate" in problem for problem in check(fill_aws(), tmp_path))


@pytest.mark.parametrize(
    ("problem", "change"),
    [
        ("authOptions.mode must be token", lambda c: c["spec"]["rayClusterSpec"].pop("authOptions")),
        ("the pinned", lambda c: c["spec"]["rayClusterSpec"].update(rayVersion="2.9.0")),
        ("requests and limits", lambda c: pod(c).pop("resources")),
        ("image's tag", lambda c: pod(c).update(image="here/physioray:latest")),
        ("entrypoint", lambda c: c["spec"].pop("entrypoint")),
    ],
)
def test_a_kubernetes_file_that_stands_open_or_floats_is_named(problem: str, change: Change, tmp_path: Path) -> None:
    config = load("kuberay.yaml")
    change(config)
    assert any(problem in found for found in check(config, tmp_path))


def pod(config: dict[str, Any]) -> dict[str, Any]:
    return config["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]


def test_the_command_says_what_to_mend_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(CLUSTER / "aws.yaml")]) == 1
    printed = capsys.readouterr().out
    assert "3 to mend" in printed and "sg-REPLACE" in printed
    assert main([]) == 2
