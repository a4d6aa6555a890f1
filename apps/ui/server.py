"""Serves the pages: Streamlit as a child process, on this machine only, until somebody stops it."""

from __future__ import annotations

import contextlib
import http
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Iterator
from pathlib import Path

from workbench.runtime import WorkbenchError
from workbench.store import runs_root, writing

ADDRESS = "127.0.0.1"
SCRIPT = Path(__file__).with_name("main.py")
STOP_SECONDS = 5.0
START_SECONDS = 60.0
STANDARD_ERROR = 2

FLAGS = {
    "server.address": ADDRESS,
    # Opening the window is ours: Streamlit would ask for an e-mail address first.
    "server.headless": "true",
    "server.fileWatcherType": "none",
    "server.runOnSave": "false",
    "server.enableXsrfProtection": "true",
    "server.enableCORS": "true",
    "server.maxUploadSize": "2000",
    "browser.gatherUsageStats": "false",
    "browser.serverAddress": ADDRESS,
    "client.toolbarMode": "minimal",
    "client.showErrorLinks": "false",
    "global.developmentMode": "false",
    # A widget has a default and may be set by a click on a chart: both are meant.
    "global.disableWidgetStateDuplicationWarning": "true",
    "theme.base": "light",
}


def serve(*, port: int, open_browser: bool, runs: Path | None = None) -> int:
    """Serve the pages over a runs folder until the server ends; its exit code.

    Ctrl-C and termination stop the server first, then go on to the caller.

    Raises:
        WorkbenchError: the port is taken or is none, or the runs folder cannot be made.
    """
    check_port(port)
    root = runs_root(runs).resolve()
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    with _terminated_like_interrupted(), _running(port, root) as process:
        if open_browser:
            threading.Thread(target=_open_when_ready, args=(process, port), daemon=True).start()
        return process.wait()


def check_port(port: int) -> None:
    """Raise a WorkbenchError unless this process may listen on the port now."""
    if not 1 <= port <= 65_535:
        raise WorkbenchError(f"Port {port} does not exist: ports go from 1 to 65535. Choose another --port.")
    with socket.socket() as probe:
        # As the server will: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise WorkbenchError(
                f"Cannot listen on port {port} of {ADDRESS}: {reason}. Choose another, such as --port {_free_port()}."
            ) from error


def url(port: int) -> str:
    """Where the pages are."""
    return f"http://{ADDRESS}:{port}"


def answers(port: int) -> bool:
    """Whether the server is up. Asked directly: a proxy from the environment does not know this machine's ports."""
    connection = http.client.HTTPConnection(ADDRESS, port, timeout=1)
    try:
        connection.request("GET", "/_stcore/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def command(port: int) -> list[str]:
    """The server's command line."""
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    return [sys.executable, "-m", "streamlit", "run", str(SCRIPT), f"--server.port={port}", *flags]


@contextlib.contextmanager
def _running(port: int, root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server's process, ended when the block ends."""
    environment = {**os.environ, "WORKBENCH_RUNS": str(root)}
    # Standard output belongs to the command line's JSON.
    process = subprocess.Popen(command(port), stdin=subprocess.DEVNULL, stdout=STANDARD_ERROR, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Makes a termination end the block as Ctrl-C does, so that the server does not outlive its parent."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _open_when_ready(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        if answers(port):
            webbrowser.open(url(port))
            return
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return probe.getsockname()[1]
