"""Starts Prometheus beside the head of a running cluster, and hands Grafana all dashboards: python dashboards/serve.py.

Prometheus listens on the head's loopback (127.0.0.1:9090). Ray's dashboards and physioray's lie in one folder, which
Grafana is told of by the settings that Ray has written; the command for it is printed. Ctrl-C ends Prometheus.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SESSION = Path("/tmp/ray/session_latest")


def provision(session: Path = SESSION, patience: float = 60.0) -> Path:
    """Put physioray's dashboard beside Ray's.

    Args:
        session: folder of the running cluster.
        patience: seconds that a cluster which has just started is given to write its own.

    Returns:
        The folder of settings for Grafana.

    Raises:
        FileNotFoundError: no cluster runs on this machine.
    """
    folder = session / "metrics" / "grafana"
    end = time.monotonic() + patience
    while not folder.exists() and session.exists() and time.monotonic() < end:
        time.sleep(0.5)
    if not folder.exists():
        raise FileNotFoundError(
            f"A Ray head must run on this machine, but {folder} does not exist. Start the cluster first."
        )
    boards = folder / "dashboards"
    boards.mkdir(exist_ok=True)
    shutil.copy(HERE / "physioray.json", boards / "physioray.json")
    return folder


def main() -> int:
    """Provision, then run Prometheus until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="/tmp/ray/prometheus", help="where figures are kept (default %(default)s)")
    parser.add_argument("--listen", default="127.0.0.1:9090", help="address (default %(default)s)")
    parser.add_argument("--keep", default="15d", help="for how long figures are kept (default %(default)s)")
    options = parser.parse_args()
    program = shutil.which("prometheus")
    if program is None:
        print("Prometheus must be installed, but is not. Debian, Ubuntu: apt-get install prometheus", file=sys.stderr)
        return 1
    try:
        folder = provision()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Prometheus on http://{options.listen}. For Grafana, in another terminal on this machine:")
    print(f"  grafana server --homepath /usr/share/grafana --config {folder / 'grafana.ini'}", flush=True)
    return subprocess.call(
        [
            program,
            f"--config.file={HERE / 'prometheus.yml'}",
            f"--storage.tsdb.path={options.data}",
            f"--storage.tsdb.retention.time={options.keep}",
            f"--web.listen-address={options.listen}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
