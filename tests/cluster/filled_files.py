"""The repository's cluster files with their placeholders filled in, as a user would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
TOKEN = "0123456789abcdef" * 4

CPU_IMAGE, GPU_IMAGE = "ami-0000000000000c0c0", "ami-00000000000009900"


def fill_aws(group: str = "sg-00000000000000000") -> dict[str, Any]:
    """aws.yaml with images and a security group."""
    text = (CLUSTER / "aws.yaml").read_text()
    for placeholder, value in (
        ("ami-REPLACE-UBUNTU", CPU_IMAGE),
        ("ami-REPLACE-DEEP-LEARNING-BASE", GPU_IMAGE),
        ("sg-REPLACE", group),
    ):
        assert placeholder in text
        text = text.replace(placeholder, value)
    return yaml.safe_load(text)


def fill_local(head: str, workers: list[str], *, user: str = "someone", key: str = "~/.ssh/cluster") -> dict[str, Any]:
    """local.yaml with addresses, user and key."""
    config = yaml.safe_load((CLUSTER / "local.yaml").read_text())
    config["provider"] |= {"head_ip": head, "worker_ips": workers}
    config["auth"] |= {"ssh_user": user, "ssh_private_key": key}
    config |= {"min_workers": len(workers), "max_workers": len(workers)}
    return config


def make_home(folder: Path) -> Path:
    """A home folder with a token that only its owner can read."""
    token = folder / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text(TOKEN)
    token.chmod(0o600)
    return folder
