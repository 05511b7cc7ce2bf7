"""Whether this machine lets a test have network and process namespaces of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys

ISOLATED = ("unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child")
"""A network without a route, and processes that end with the first of them."""


def explain_missing(*programs: str) -> str | None:
    """Why namespaces or programs cannot be used here; None if they can."""
    if sys.platform != "linux":
        return "needs Linux"
    missing = [name for name in ("unshare", "ip", *programs) if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: util-linux, iproute2, openssh-server, rsync)"
    tried = subprocess.run([*ISOLATED, "ip", "link", "set", "lo", "up"], capture_output=True, text=True)
    return f"namespaces are not permitted here: {tried.stderr.strip()}" if tried.returncode else None
