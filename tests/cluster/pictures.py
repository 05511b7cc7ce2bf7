"""Looks at Ray's dashboard and at TensorBoard with a real browser, and takes pictures of what it sees."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

CHROMIUM = Path("/usr/bin/chromium")
WAIT = 120_000
"""Milliseconds that a page is given to show what it must; a busy machine takes long."""


def explain_no_browser() -> str | None:
    """Why no pictures can be taken here; None if they can."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "needs playwright (pip install playwright)"
    return None if CHROMIUM.exists() else f"needs a browser at {CHROMIUM} (apt-get install chromium)"


class Camera:
    """Takes pictures into a folder; one that fails is kept as a sentence, so that what it looks at goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.missing = folder, explain_no_browser()
        self.failures: list[str] = []
        folder.mkdir(exist_ok=True)

    def take(self, photograph: Callable[..., None], *arguments: Any, **named: Any) -> None:
        """Call one of the functions below, if there is a browser."""
        if self.missing is None:
            try:
                photograph(*arguments, folder=self.folder, **named)
            except Exception as error:
                self.failures.append(f"{photograph.__name__} {named}: {error}")

    def list_sizes(self) -> dict[str, int]:
        """Bytes of every picture, by name."""
        return {path.stem: path.stat().st_size for path in self.folder.glob("*.png")}


@contextmanager
def open_browser(cookie: dict[str, str] | None = None) -> Iterator[Any]:
    """A page of a real browser; a cookie is `name`, `value` and `url`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(viewport={"width": 1500, "height": 900})
        if cookie is not None:
            context.add_cookies([cookie])
        try:
            yield context.new_page()
        finally:
            browser.close()


def photograph_dashboard(address: str, token: str, job: str, shown: list[str], *, folder: Path, name: str) -> None:
    """Ray's dashboard with a job that runs, and its cluster with some words, as NAME-jobs.png and NAME-cluster.png."""
    with open_browser({"name": "ray-authentication-token", "value": token, "url": address}) as page:
        page.goto(f"{address}/#/jobs")
        row = page.locator("tr", has_text=job).first
        row.get_by_text("RUNNING", exact=True).wait_for(timeout=WAIT)
        page.screenshot(path=str(folder / f"{name}-jobs.png"))
        page.goto(f"{address}/#/cluster")
        for text in shown:
            page.get_by_text(text, exact=False).first.wait_for(timeout=WAIT)
        page.screenshot(path=str(folder / f"{name}-cluster.png"))


@contextmanager
def serve_tensorboard(logdir: Path, log: Path) -> Iterator[str]:
    """TensorBoard of a folder of runs while the body runs; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--load_fast=false"]
    with log.open("wb") as sink:
        server = subprocess.Popen([*command, "--host=127.0.0.1", f"--port={port}"], stdout=sink, stderr=sink)
    try:
        for _ in range(600):
            try:
                requests.get(f"http://127.0.0.1:{port}/data/environment", timeout=5)
                break
            except requests.RequestException:
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def photograph_tensorboard(
    logdir: Path, *, folder: Path, name: str = "tensorboard", tab: str = "timeseries", show: str = "train/loss"
) -> None:
    """A tab of TensorBoard that shows a given text, as NAME.png."""
    with serve_tensorboard(logdir, folder / "tensorboard.log") as address, open_browser() as page:
        page.goto(f"{address}/#{tab}")
        page.get_by_text(show, exact=False).first.wait_for(timeout=WAIT)
        # Curves are drawn a moment after their titles.
        page.wait_for_timeout(3000)
        page.screenshot(path=str(folder / f"{name}.png"))
