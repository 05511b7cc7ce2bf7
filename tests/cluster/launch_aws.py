"""Launches aws.yaml against a simulated EC2; run inside a network namespace without a route, by test_aws.py.

The simulated EC2 invents public addresses that belong to real machines, and Ray would reach for them by ssh: so
nothing here runs where a packet could leave, and the first thing done is to make sure of that.

    python launch_aws.py FOLDER     writes FOLDER/found.json
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import boto3
import requests
import yaml

from tests.cluster.filled_files import CLUSTER, CPU_IMAGE, GPU_IMAGE, ROOT, fill_aws, make_home

PORT = 5111
ENDPOINT = f"http://127.0.0.1:{PORT}"
ADDRESS = "203.0.113.7/32"

FAKE_SSH = """#!/bin/bash
printf '%s\\n' "$*" >> "$CALLS"
[ -z "$SSH_FAILS" ] || exit 255
exit 0
"""


def refuse_a_route() -> None:
    """Stop unless this process is where no packet can leave."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    routes = subprocess.run(["ip", "route", "show", "table", "all"], capture_output=True, text=True, check=True).stdout
    devices = sorted(os.listdir("/sys/class/net")) if os.path.isdir("/sys/class/net") else []
    if any(line.startswith("default") for line in routes.splitlines()):
        sys.exit(f"There must be no route out, but there is one: {routes} {devices}")
    try:
        socket.create_connection(("203.0.113.1", 22), timeout=1)
    except OSError:
        return
    sys.exit("A connection out must fail, but did not.")


def set_environment(folder: Path) -> None:
    home = make_home(folder / "home")
    commands = folder / "commands"
    commands.mkdir()
    for name in ("ssh", "rsync"):
        (commands / name).write_text(FAKE_SSH)
        (commands / name).chmod(0o755)
    os.environ |= {
        "AWS_ENDPOINT_URL": ENDPOINT,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "BOTO_MAX_RETRIES": "1",
        "HOME": str(home),
        "TMPDIR": str(folder),
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CALLS": str(folder / "calls"),
    }


def start_server(folder: Path) -> subprocess.Popen[bytes]:
    """The simulated AWS, which knows only our two images and refuses machine types that do not exist."""
    images = [
        {"ami_id": image, "name": image, "owner_id": "1", "architecture": "x86_64", "root_device_name": "/dev/sda1"}
        | {"root_device_type": "ebs", "virtualization_type": "hvm", "state": "available", "public": True}
        | {"image_location": "x", "image_type": "machine", "hypervisor": "xen", "description": "", "platform": None}
        for image in (CPU_IMAGE, GPU_IMAGE)
    ]
    (folder / "images.json").write_text(json.dumps(images))
    settings = {
        "MOTO_AMIS_PATH": str(folder / "images.json"),
        "MOTO_ENABLE_AMI_VALIDATION": "1",
        "MOTO_ENABLE_KEYPAIR_VALIDATION": "1",
        "MOTO_EC2_ENABLE_INSTANCE_TYPE_VALIDATION": "1",
        "MOTO_RECORDER_FILEPATH": str(folder / "recorded"),
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(PORT)]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)
    for _ in range(300):
        try:
            requests.get(f"{ENDPOINT}/moto-api/", timeout=1)
            return server
        except requests.ConnectionError:
            time.sleep(0.1)
    sys.exit("The simulated AWS did not start: " + (folder / "server.log").read_text())


def make_account() -> dict[str, str]:
    """The stack of account.yaml, and its outputs."""
    network = boto3.client("ec2").describe_vpcs()["Vpcs"][0]["VpcId"]
    stacks = boto3.client("cloudformation")
    stacks.create_stack(
        StackName="physioray",
        TemplateBody=(CLUSTER / "account.yaml").read_text(),
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[
            {"ParameterKey": "Vpc", "ParameterValue": network},
            {"ParameterKey": "Address", "ParameterValue": ADDRESS},
        ],
    )
    outputs = stacks.describe_stacks(StackName="physioray")["Stacks"][0]["Outputs"]
    return {item["OutputKey"]: item["OutputValue"] for item in outputs}


def run_ray(*command: str, **environment: str) -> dict[str, Any]:
    ray = str(Path(sys.executable).parent / "ray")
    done = subprocess.run(
        [ray, *command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    return {"code": done.returncode, "printed": done.stdout + done.stderr}


def list_machines() -> list[dict[str, Any]]:
    pages = boto3.client("ec2").describe_instances()["Reservations"]
    return [machine for page in pages for machine in page["Instances"]]


def launch_workers(path: Path) -> None:
    """Ask for one machine of every worker type, with the settings that the autoscaler on the head would use."""
    from ray.autoscaler._private.commands import _bootstrap_config
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    config = _bootstrap_config(yaml.safe_load(path.read_text()), no_config_cache=True)
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    for name, kind in config["available_node_types"].items():
        if name != config["head_node_type"]:
            tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: name, "ray-node-name": f"ray-{name}"}
            provider.create_node(kind["node_config"], tags, 1)
    Path(os.environ["CALLS"] + ".resources").write_text(
        json.dumps({name: kind["resources"] for name, kind in config["available_node_types"].items()})
    )


def read_requests() -> list[dict[str, str]]:
    """Every request that the simulated AWS got, as its fields."""
    found = []
    for line in requests.get(f"{ENDPOINT}/moto-api/recorder/download-recording", timeout=10).text.splitlines():
        entry = json.loads(line)
        body = entry.get("body") or ""
        if entry.get("body_encoded"):
            body = base64.b64decode(body).decode()
        found.append(dict(parse_qsl(body)))
    return found


def main(folder: Path) -> None:
    refuse_a_route()
    set_environment(folder)
    server = start_server(folder)
    try:
        account = make_account()
        path = folder / "aws.yaml"
        path.write_text(yaml.safe_dump(fill_aws(account["SecurityGroup"])))
        from cluster.check import check_file

        requests.post(f"{ENDPOINT}/moto-api/recorder/start-recording", timeout=10)
        up = run_ray("up", "-y", "--no-config-cache", "--disable-usage-stats", str(path))
        after_up = list_machines()
        launch_workers(path)
        groups = boto3.client("ec2").describe_security_groups(GroupIds=[account["SecurityGroup"]])["SecurityGroups"]
        found: dict[str, Any] = {
            "problems": check_file(path, root=ROOT),
            "up": up,
            "after_up": after_up,
            "machines": list_machines(),
            "volumes": boto3.client("ec2").describe_volumes()["Volumes"],
            "group": groups[0],
            "groups": boto3.client("ec2").describe_security_groups()["SecurityGroups"],
            "account": account,
            "resources": json.loads(Path(os.environ["CALLS"] + ".resources").read_text()),
            "profiles": boto3.client("iam").list_instance_profiles()["InstanceProfiles"],
            "calls": (folder / "calls").read_text().splitlines(),
        }
        found["down"] = run_ray("down", "-y", str(path))
        found["after_down"] = list_machines()
        found["half"] = run_ray(
            "up", "-y", "--no-config-cache", "--disable-usage-stats", str(path),
            SSH_FAILS="1", AUTOSCALER_NODE_START_WAIT_S="3",
        )  # fmt: skip
        found["after_half"] = [m for m in list_machines() if m["State"]["Name"] == "running"]
        found["half_down"] = run_ray("down", "-y", str(path))
        found["after_half_down"] = [m for m in list_machines() if m["State"]["Name"] == "running"]
        found["requests"] = read_requests()
        (folder / "found.json").write_text(json.dumps(found, default=str))
    finally:
        server.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
