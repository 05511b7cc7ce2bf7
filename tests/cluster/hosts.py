"""Test hosts on one machine: namespaces with a network address, processes, a home and an sshd of their own.

They share the file system, as hosts with NFS do, except for their home, /tmp/ray and /dev/shm. Everything is made
inside the namespaces of the process that calls, so nothing is left when that process ends.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

NETWORK = "10.77.0"
BRIDGE = "lab0"

SSHD = """Port 22
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""

INIT = """set -e
hostname {name}
mount --bind {folder}/passwd /etc/passwd
mkdir -p {folder}/tmp_ray /tmp/ray /run/sshd
mount --bind {folder}/tmp_ray /tmp/ray
mount -t tmpfs -o size=1g none /dev/shm
ip link set lo up
# The network comes when the other end has been handed over.
for i in $(seq 200); do ip link show eth0 >/dev/null 2>&1 && break; sleep 0.05; done
ip addr add {address}/24 dev eth0
ip link set eth0 up
# Ray finds a machine's address by its way out; this one ends at the bridge, behind which there is nothing.
ip route add default via {network}.1
exec "$(command -v sshd)" -D -e -f {folder}/sshd_config
"""


def prepare_laboratory(folder: Path) -> None:
    """A bridge with the address of the user's own machine, and a /tmp/ray of its own."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], check=True)
    subprocess.run(["ip", "addr", "add", f"{NETWORK}.1/24", "dev", BRIDGE], check=True)
    subprocess.run(["ip", "link", "set", BRIDGE, "up"], check=True)
    for path in ("/tmp/ray", str(folder / "own_tmp_ray")):
        Path(path).mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "--bind", str(folder / "own_tmp_ray"), "/tmp/ray"], check=True)


class Host:
    """One test host; `start` boots it, `lose` is the power cut."""

    def __init__(self, folder: Path, number: int, public_key: str, virtual_environment: str) -> None:
        self.name, self.address = f"host{number}", f"{NETWORK}.{10 + number}"
        self.folder = folder / self.name
        home = self.folder / "home"
        home.mkdir(parents=True)
        (home / "venv").symlink_to(virtual_environment)
        (home / ".bashrc").touch()
        (self.folder / "authorized_keys").write_text(public_key)
        (self.folder / "passwd").write_text(
            f"root:x:0:0:root:{home}:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
            "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
        )
        (self.folder / "sshd_config").write_text(SSHD.format(address=self.address, folder=self.folder))
        key = str(self.folder / "host_key")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Boot: new namespaces, the network, and an sshd."""
        script = INIT.format(network=NETWORK, name=self.name, folder=self.folder, address=self.address)
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        with open(self.folder / "console", "ab") as console:
            isolated = ("unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--mount-proc", "--kill-child")
            self.process = subprocess.Popen(
                [*isolated, "bash", "-c", script],
                stdout=console,
                stderr=console,
                env=environment,
            )
        first = self.find_first_process()
        there, here = f"veth{self.address[-2:]}", f"port{self.address[-2:]}"
        subprocess.run(["ip", "link", "add", here, "type", "veth", "peer", "name", there], check=True)
        subprocess.run(["ip", "link", "set", here, "master", BRIDGE, "up"], check=True)
        subprocess.run(["ip", "link", "set", there, "netns", str(first), "name", "eth0"], check=True)
        for _ in range(200):
            try:
                socket.create_connection((self.address, 22), timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError(f"{self.name} did not boot: {(self.folder / 'console').read_text()[-2000:]}")

    def find_first_process(self) -> int:
        """The process id, here, of the host's first process."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for _ in range(200):
            found = children.read_text().split()
            if found:
                return int(found[0])
            time.sleep(0.05)
        raise TimeoutError(f"{self.name} has no first process.")

    def list_commands(self) -> list[str]:
        """Command lines of all processes of the host."""
        first = self.find_first_process()
        space = os.readlink(f"/proc/{first}/ns/pid")
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and os.readlink(folder / "ns" / "pid") == space:
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
            except OSError:  # it has just ended
                continue
        return found

    def lose(self) -> None:
        """Everything on the host ends at once, without a word to anybody, and its network is gone."""
        assert self.process is not None
        subprocess.run(["ip", "link", "delete", f"port{self.address[-2:]}"], check=True)
        os.kill(self.find_first_process(), signal.SIGKILL)
        self.process.wait()
