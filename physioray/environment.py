"""Says what code runs on what machine, for whoever wants to repeat a result."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

PACKAGES = ("torch", "ray", "numpy", "scipy", "scikit-learn", "pyarrow", "optuna", "matplotlib")
"""Whose versions a result may depend on."""


def describe_environment(device: str = "cpu") -> dict[str, str]:
    """Versions of the packages, and the hardware of this machine, in words.

    Args:
        device: where trainings run, `cpu` or `cuda`.
    """
    facts = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = "not installed"
    facts["System"] = f"{platform.system()} {platform.release()}, {platform.machine()}"
    facts["Processor"] = f"{_name_processor()}, {os.cpu_count()} cores"
    if memory := _count_memory():
        facts["Memory"] = f"{memory / 1e9:.0f} GB"
    facts["GPU"] = ", ".join(_list_gpus()) or "none"
    facts["Trainings ran on"] = device
    return facts


def _name_processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as source:
            names = [line.partition(":")[2].strip() for line in source if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _count_memory() -> int:
    """Bytes of memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _list_gpus() -> list[str]:
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
