"""What aws.yaml asks of AWS, read from a simulated EC2 in a network without a route."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from tests.cluster.filled_files import CPU_IMAGE, GPU_IMAGE, ROOT, TOKEN
from tests.cluster.kept import keep_text
from tests.cluster.namespaces import ISOLATED, explain_missing

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

TYPES = {
    "head": ("m7i.xlarge", CPU_IMAGE, {"VolumeSize": "100"}),
    "ingest": ("c7i.8xlarge", CPU_IMAGE, {"VolumeSize": "100", "Iops": "3000", "Throughput": "250"}),
    "train-g5": ("g5.12xlarge", GPU_IMAGE, {"VolumeSize": "300", "Iops": "6000", "Throughput": "500"}),
    "train-p4d": ("p4d.24xlarge", GPU_IMAGE, {"VolumeSize": "300", "Iops": "6000", "Throughput": "500"}),
    "train-p5": ("p5.48xlarge", GPU_IMAGE, {"VolumeSize": "300", "Iops": "6000", "Throughput": "500"}),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    reason = explain_missing()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("aws")
    command = [*ISOLATED, sys.executable, "-m", "tests.cluster.launch_aws", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    found = json.loads((folder / "found.json").read_text())
    keep_text("recorded-by-the-simulated-aws.txt", describe_recorded(found))
    return found


def describe_recorded(found: dict[str, Any]) -> str:
    """What the simulated AWS recorded, for people: the requests by kind, and what was asked of every machine."""
    kinds = Counter(request["Action"] for request in found["requests"] if "Action" in request)
    lines = [", ".join(f"{name} {count}" for name, count in sorted(kinds.items()))]
    for name, request in read_launches(found).items():
        disk = {key.rsplit(".", 1)[1]: value for key, value in request.items() if key.startswith("BlockDeviceMapping")}
        lines.append(
            f"{name}: {request['InstanceType']}, image {request['ImageId']}, "
            f"{request.get('InstanceMarketOptions.MarketType', 'on demand')}, "
            f"profile {request['IamInstanceProfile.Name']}, "
            f"HttpTokens {request['MetadataOptions.HttpTokens']}, disk {disk}"
        )
    for rule in found["group"]["IpPermissions"]:
        lines.append(f"security group: {json.dumps(rule)}")
    return "\n".join(lines)


def name_type(machine: dict[str, Any]) -> str:
    return next(tag["Value"] for tag in machine["Tags"] if tag["Key"] == "ray-user-node-type")


def read_launches(found: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The request for a machine of every type; the last one where there were several."""
    launches = {}
    for request in found["requests"]:
        if request.get("Action") == "RunInstances":
            number = next(key[:-4] for key, value in request.items() if value == "ray-user-node-type")
            launches[request[f"{number}.Value"]] = request
    return launches


def test_ray_up_launches_the_head_alone_and_ray_down_ends_everything(found: dict[str, Any]) -> None:
    assert found["problems"] == []
    assert found["up"]["code"] == 0, found["up"]["printed"][-3000:]
    assert [name_type(machine) for machine in found["after_up"]] == ["head"]
    assert found["down"]["code"] == 0
    assert {machine["State"]["Name"] for machine in found["after_down"]} == {"terminated"}


def test_every_machine_is_of_the_type_image_and_disk_that_the_file_names(found: dict[str, Any]) -> None:
    launches = read_launches(found)
    assert set(launches) == set(TYPES)
    for name, (kind, image, disk) in TYPES.items():
        request = launches[name]
        assert (request["InstanceType"], request["ImageId"]) == (kind, image)
        stated = {key: request.get(f"BlockDeviceMapping.1.Ebs.{key}") for key in disk}
        assert stated == disk
        assert request["BlockDeviceMapping.1.Ebs.VolumeType"] == "gp3"
        assert request["BlockDeviceMapping.1.Ebs.Encrypted"] == "true"
        assert request["BlockDeviceMapping.1.Ebs.DeleteOnTermination"] == "true"
        assert request["MetadataOptions.HttpTokens"] == "required"


def test_workers_are_spot_and_the_head_is_not(found: dict[str, Any]) -> None:
    markets = {name: request.get("InstanceMarketOptions.MarketType") for name, request in read_launches(found).items()}
    assert markets == {name: None if name == "head" else "spot" for name in TYPES}
    assert {name_type(m): m.get("InstanceLifecycle") for m in found["machines"]} == markets


def test_workers_have_a_role_that_can_start_no_machine(found: dict[str, Any]) -> None:
    profiles = {name_type(m): m["IamInstanceProfile"]["Arn"].split("/")[-1] for m in found["machines"]}
    assert profiles == {name: "physioray-head" if name == "head" else "physioray-worker" for name in TYPES}


def test_machines_and_disks_carry_the_tag_by_which_they_are_found_and_ended(found: dict[str, Any]) -> None:
    for item in [*found["machines"], *found["volumes"]]:
        assert {"Key": "Project", "Value": "physioray"} in item["Tags"]
    assert len(found["volumes"]) == len(found["machines"]) == len(TYPES)


def test_no_port_is_open_to_the_world_and_ray_made_no_group_of_its_own(found: dict[str, Any]) -> None:
    group = found["account"]["SecurityGroup"]
    assert all([item["GroupId"] for item in m["SecurityGroups"]] == [group] for m in found["machines"])
    from_outside = [rule for rule in found["group"]["IpPermissions"] if not rule["UserIdGroupPairs"]]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in from_outside] == [(22, 22)]
    assert [item["CidrIp"] for rule in from_outside for item in rule["IpRanges"]] == ["203.0.113.7/32"]
    within = [rule for rule in found["group"]["IpPermissions"] if rule["UserIdGroupPairs"]]
    assert {pair["GroupId"] for rule in within for pair in rule["UserIdGroupPairs"]} == {group}
    assert not any("ray-autoscaler" in item["GroupName"] for item in found["groups"])


def test_the_head_runs_no_tasks_and_workers_offer_what_their_machine_has(found: dict[str, Any]) -> None:
    offered = found["resources"]
    assert offered["head"] == {"CPU": 0}
    assert offered["ingest"]["CPU"] == 32 and "GPU" not in offered["ingest"]
    assert (offered["train-g5"]["GPU"], offered["train-p4d"]["GPU"], offered["train-p5"]["GPU"]) == (4, 8, 8)


def test_the_token_is_copied_before_ray_starts_and_stands_in_no_command(found: dict[str, Any]) -> None:
    calls = found["calls"]
    copied = next(number for number, call in enumerate(calls) if call.endswith(":~/.ray/auth_token"))
    closed = next(number for number, call in enumerate(calls) if "chmod 600 ~/.ray/auth_token" in call)
    started = next(number for number, call in enumerate(calls) if "ray start --head" in call)
    assert copied < closed < started
    assert "RAY_AUTH_MODE=token" in calls[started] and "--dashboard-host=127.0.0.1" in calls[started]
    everything = json.dumps([calls, found["up"], found["requests"]])
    assert TOKEN not in everything and "PRIVATE KEY" not in everything


def test_a_launch_that_fails_half_way_leaves_a_machine_that_ray_down_ends(found: dict[str, Any]) -> None:
    assert found["half"]["code"] != 0
    assert [name_type(machine) for machine in found["after_half"]] == ["head"]
    assert found["half_down"]["code"] == 0 and found["after_half_down"] == []
