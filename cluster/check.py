"""Checks a cluster file before it costs money: python cluster/check.py cluster/aws.yaml.

Nothing leaves the machine. What is looked at: values left to fill in, Ray's own rules of form, AWS's own rules of
form for every machine, and what this project demands of a cluster: nothing open to the world, a token on every
start, IMDSv2, pinned images, encrypted disks, no stopped machines that go on costing.
"""

from __future__ import annotations

import copy
import io
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

PLACEHOLDER = "REPLACE"
KUBERAY_KINDS = ("RayJob", "RayCluster")


def check_file(path: str | Path, *, root: str | Path = ".") -> list[str]:
    """What must be mended in a cluster file before it is used; empty if nothing.

    Args:
        path: a file for `ray up` or for KubeRay.
        root: the folder from which `ray up` will be called; relative file mounts start there.

    Returns:
        One sentence a problem: what must hold, and what was found.
    """
    text = Path(path).read_text()
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [f"The file must be YAML, but: {error}"]
    if not isinstance(config, dict):
        return [f"The file must hold settings by name, but holds {type(config).__name__}."]
    problems = [f"{place} must be filled in, but is {value!r}." for value, place in find_placeholders(config).items()]
    problems += [f"No secret may stand here, but {place} looks like one." for place in find_secrets(config)]
    if config.get("kind") in KUBERAY_KINDS:
        return problems + check_kuberay(config)
    problems += check_ray_rules(config)
    if problems and any(text.startswith("Ray's rules") for text in problems):
        return problems
    problems += check_commands(config) + check_mounts(config, Path(root))
    if config["provider"]["type"] == "aws":
        problems += check_aws(config)
    return problems


def walk(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested settings with its place, for example `provider.region`."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from walk(item, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from walk(item, f"{place}[{number}]")
    elif isinstance(value, str):
        yield place, value


def find_placeholders(config: dict[str, Any]) -> dict[str, str]:
    """Values that are still to be filled in, each with the first of its places."""
    found: dict[str, str] = {}
    for place, value in walk(config):
        if PLACEHOLDER in value:
            found.setdefault(value, place)
    return found


def find_secrets(config: dict[str, Any]) -> list[str]:
    """Places of values that look like an access key, a private key or a written-out token."""
    pattern = re.compile(r"AKIA[0-9A-Z]{16}|PRIVATE KEY|(RAY_AUTH_TOKEN|AWS_SECRET_ACCESS_KEY)\s*[=:]\s*['\"]?\w")
    return [place for place, value in walk(config) if pattern.search(value)]


def check_ray_rules(config: dict[str, Any]) -> list[str]:
    """Ray's own schema and its checks before a launch."""
    # Private, but the only place where Ray's rules are written down; the version of Ray is pinned.
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        # What it prints is advice on Docker, which is not used here.
        with redirect_stdout(io.StringIO()):
            validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:
        return [f"Ray's rules of form must hold, but: {str(error).strip().splitlines()[0]}"]
    problems = []
    for name, kind in config.get("available_node_types", {}).items():
        least, most = kind.get("min_workers", 0), kind.get("max_workers", config.get("max_workers", 0))
        if least > most:
            problems.append(f"{name}: min_workers must not be above max_workers, but {least} is above {most}.")
    return problems


def check_commands(config: dict[str, Any]) -> list[str]:
    """Every `ray start` demands the token, and the dashboard stays on the head's loopback."""
    problems = []
    for place in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config.get(place, []) if "ray start" in command]
        if len(starts) != 1:
            problems.append(f"{place} must hold one `ray start`, but holds {len(starts)}.")
        for command in starts:
            if "RAY_AUTH_MODE=token" not in command:
                problems.append(f"{place} must set RAY_AUTH_MODE=token before `ray start`, or the node stands open.")
            if re.search(r"--dashboard-host[= ](?!127\.0\.0\.1|localhost)", command):
                problems.append(f"{place} must keep the dashboard on 127.0.0.1; `ray dashboard` brings it to you.")
            if place.startswith("head") and "--autoscaling-config" not in command:
                problems.append(f"{place} must pass --autoscaling-config, or no worker is ever started.")
    return problems


def check_mounts(config: dict[str, Any], root: Path) -> list[str]:
    """Every file that is to be copied exists here, and the token is readable by its owner alone."""
    problems = []
    mounts = config.get("file_mounts", {})
    for source in mounts.values():
        found = root / Path(source).expanduser()
        if not found.exists():
            hint = " Run: ray get-auth-token --generate" if "auth_token" in source else ""
            problems.append(f"file_mounts must exist here, but {source} does not.{hint}")
        elif "auth_token" in source and stat.S_IMODE(found.stat().st_mode) & 0o077:
            problems.append(f"{source} must be readable by you alone, but is not. Run: chmod 600 {source}")
    if not any(target.rstrip("/").endswith(".ray/auth_token") for target in mounts):
        problems.append("file_mounts must bring ~/.ray/auth_token to every node, but does not.")
    return problems


def check_aws(config: dict[str, Any]) -> list[str]:
    """AWS's rules of form for every machine, and this project's rules for money and safety."""
    problems = []
    if config["provider"].get("cache_stopped_nodes", True):
        problems.append("provider.cache_stopped_nodes must be false, or disks of stopped machines go on costing.")
    if not config.get("idle_timeout_minutes"):
        problems.append("idle_timeout_minutes must be set, or workers without work go on costing.")
    for name, kind in config["available_node_types"].items():
        machine = kind["node_config"]
        found = check_aws_form(machine) + check_aws_demands(machine)
        if name == config["head_node_type"]:
            if "InstanceMarketOptions" in machine:
                found.append("the head must be on demand, but is a spot machine: a lost head is a lost cluster")
            if kind["resources"].get("CPU") != 0:
                found.append("the head must have CPU: 0, so that no task takes the memory of driver and dashboard")
        problems += [f"{name}: {problem}." for problem in found]
    return problems


def check_aws_form(machine: dict[str, Any]) -> list[str]:
    """Names and types of a machine's settings, against the description of the API that boto3 carries."""
    from botocore.session import get_session
    from botocore.validate import ParamValidator

    shape = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    # Ray's own, resolved to one subnet a request.
    request = {key: value for key, value in machine.items() if key != "SubnetIds"} | {"MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(request, shape)
    return [line.rstrip(".") for line in report.generate_report().splitlines()]


def check_aws_demands(machine: dict[str, Any]) -> list[str]:
    """What this project demands of every machine, beyond AWS's rules."""
    problems = []
    image = machine.get("ImageId", "")
    if PLACEHOLDER not in image and not re.fullmatch(r"ami-[0-9a-f]{8}([0-9a-f]{9})?", image):
        problems.append(f"ImageId must be a pinned image (ami- and 8 or 17 digits), but is {image!r}")
    if not machine.get("SecurityGroupIds"):
        problems.append("SecurityGroupIds must name a group, or Ray makes one whose port 22 is open to the world")
    if "IamInstanceProfile" not in machine:
        problems.append("IamInstanceProfile must be named, or the machine cannot read the bucket")
    if machine.get("MetadataOptions", {}).get("HttpTokens") != "required":
        problems.append("MetadataOptions.HttpTokens must be required (IMDSv2)")
    disks = [entry.get("Ebs", {}) for entry in machine.get("BlockDeviceMappings", [])]
    if not disks:
        problems.append("BlockDeviceMappings must be given, or the image's own small disk is used")
    for disk in disks:
        wanted = {"VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
        problems += [f"a disk's {key} must be {value}" for key, value in wanted.items() if disk.get(key) != value]
    return problems


def check_kuberay(config: dict[str, Any]) -> list[str]:
    """Structure of a RayJob or RayCluster; the operator's own schema is not at hand offline."""
    problems = []
    if config.get("apiVersion") != "ray.io/v1":
        problems.append(f"apiVersion must be ray.io/v1, but is {config.get('apiVersion')!r}.")
    spec = config.get("spec", {})
    cluster = spec.get("rayClusterSpec", {}) if config["kind"] == "RayJob" else spec
    if config["kind"] == "RayJob" and not spec.get("entrypoint"):
        problems.append("spec.entrypoint must say what is run.")
    pinned = metadata.version("ray")
    if cluster.get("rayVersion") != pinned:
        problems.append(f"rayVersion must be the pinned {pinned}, but is {cluster.get('rayVersion')!r}.")
    if cluster.get("authOptions", {}).get("mode") != "token":
        problems.append("authOptions.mode must be token, or every pod of the network may run code here.")
    groups = [cluster.get("headGroupSpec", {}), *cluster.get("workerGroupSpecs", [])]
    for group in groups:
        name = group.get("groupName", "head")
        containers = group.get("template", {}).get("spec", {}).get("containers", [])
        if not containers:
            problems.append(f"{name} must have a container.")
        for container in containers:
            image = container.get("image", "")
            if not image.endswith(f":{pinned}"):
                problems.append(f"{name}: the image's tag must be the pinned {pinned}, but is {image!r}.")
            if set(container.get("resources", {})) != {"requests", "limits"}:
                problems.append(f"{name}: resources must give requests and limits.")
        if group.get("minReplicas", 0) > group.get("maxReplicas", 0):
            problems.append(f"{name}: minReplicas must not be above maxReplicas.")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what must be mended; 1 if anything, else 0."""
    paths = sys.argv[1:] if arguments is None else list(arguments)
    if not paths:
        print("Usage: python cluster/check.py FILE ...", file=sys.stderr)
        return 2
    failed = 0
    for path in paths:
        problems = check_file(path)
        failed += len(problems)
        print(f"{path}: {'nothing to mend' if not problems else f'{len(problems)} to mend'}")
        for problem in problems:
            print(f"  - {problem}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
