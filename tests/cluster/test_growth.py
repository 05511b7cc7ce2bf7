"""A cluster that must grow first is waited for, and workers find the way to each other."""

from __future__ import annotations

import socket
import sys
import threading
import time

import pytest

from physioray.distribute import Resources, _await_resources, find_interface


class Lines:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def update(self, done: int, total: int, note: str = "") -> None:
        pass


@pytest.mark.ray
@pytest.mark.slow
def test_a_head_without_cpus_is_waited_for_until_machines_come_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        screen, began = Lines(), time.monotonic()
        _await_resources(Resources(patience=0.05), screen)
        assert time.monotonic() - began >= 3
        assert "a CPU for reading beside the workers' 1, but it has 0" in screen.said[0]
        assert "waiting up to 0.05 minutes" in screen.said[0]

        waiting = threading.Thread(target=_await_resources, args=(Resources(patience=5), screen))
        waiting.start()
        cluster.add_node(num_cpus=2)
        waiting.join(timeout=60)
        assert not waiting.is_alive() and len(screen.said) == 2
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_the_interface_of_an_address_is_found_by_the_address() -> None:
    assert find_interface("192.0.2.77") is None
    name = find_interface("127.0.0.1")
    assert name is not None and name in [interface for _, interface in socket.if_nameindex()]
