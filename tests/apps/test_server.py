"""The server serves on this machine only, says what is wrong with a port, and leaves nothing behind when stopped."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from apps.ui import server
from workbench.runtime import WorkbenchError

WAIT = 60.0
App = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind((server.ADDRESS, 0))
        return probe.getsockname()[1]


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind((server.ADDRESS, 0))
        holder.listen()
        yield holder.getsockname()[1]


def until_up(port: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + WAIT
    while not server.answers(port):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the server did not come up"
        time.sleep(0.1)


@pytest.fixture
def app(port: int, tmp_path: Path) -> Iterator[App]:
    started = []

    def start(*flags: str, at: int = port, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "apps.cli", "app", "--port", str(at), "--runs", str(tmp_path / "runs")]
        process = subprocess.Popen(
            [*command, "--json", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process, contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("impossible", [-1, 0, 65_536])
def test_a_port_that_does_not_exist(impossible: int) -> None:
    with pytest.raises(WorkbenchError, match=r"does not exist: ports go from 1 to 65535\. Choose another --port"):
        server.check_port(impossible)


def test_a_taken_port_names_a_free_one(taken: int) -> None:
    with pytest.raises(WorkbenchError, match=r"Cannot listen on port \d+ of 127\.0\.0\.1: .* --port \d+") as caught:
        server.check_port(taken)
    server.check_port(int(str(caught.value).rstrip(".").rpartition(" ")[2]))


def test_a_taken_port_is_one_line_and_exit_code_2(taken: int, app: App) -> None:
    process = app("--no-browser", at=taken)
    out, err = process.communicate(timeout=WAIT)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("workbench app: Cannot listen on port")
    assert len(err.splitlines()) == 1


def test_a_runs_folder_that_cannot_be_made(port: int, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WorkbenchError, match="Cannot write"):
        server.serve(port=port, open_browser=False, runs=tmp_path / "file" / "runs")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_interrupting_the_app_stops_the_server(number: signal.Signals, port: int, app: App, tmp_path: Path) -> None:
    process = app("--no-browser")
    until_up(port, process)
    # To the command alone, as `kill` does; the terminal's Ctrl-C reaches the server as well.
    process.send_signal(number)
    out, err = process.communicate(timeout=WAIT)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "workbench app: interrupted."
    assert not server.answers(port)
    assert (tmp_path / "runs").is_dir()
    server.check_port(port)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_both_and_is_clean(port: int, app: App) -> None:
    process = app("--no-browser")
    until_up(port, process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=WAIT)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err


@pytest.mark.slow
def test_only_this_machine_is_served_and_the_browser_opens_once(port: int, app: App, tmp_path: Path) -> None:
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" >> {opened}\n')
    browser.chmod(0o755)
    # What the environment says about proxies must not matter.
    process = app(BROWSER=f"{browser} %s", http_proxy="http://127.0.0.1:9")
    until_up(port, process)
    end = time.monotonic() + WAIT
    while not opened.exists() and time.monotonic() < end:
        time.sleep(0.1)
    listening = listeners(port)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WAIT)
    assert opened.read_text().splitlines() == [server.url(port)]
    assert listening == {server.ADDRESS}


def listeners(port: int) -> set[str]:
    """Addresses that the kernel says somebody listens on, at a port."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, _, hexadecimal = local.partition(":")
            if int(hexadecimal, 16) == port and state == "0A":
                is_four = table == "tcp"
                found.add(socket.inet_ntoa(bytes.fromhex(address)[::-1]) if is_four else f"tcp6 {address}")
    return found


def test_a_server_that_ends_by_itself_gives_its_exit_code(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "command", lambda port: [sys.executable, "-c", "raise SystemExit(3)"])
    assert server.serve(port=port, open_browser=False, runs=tmp_path) == 3


def test_a_server_that_will_not_stop_is_killed(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    monkeypatch.setattr(server, "command", lambda port: [sys.executable, "-c", stubborn])
    monkeypatch.setattr(server, "STOP_SECONDS", 0.2)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        server.serve(port=port, open_browser=False, runs=tmp_path)
    assert time.monotonic() - began < 10


def test_the_environment_names_the_runs_folder(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import json, os, pathlib; pathlib.Path(os.environ['WORKBENCH_RUNS'], 'seen').touch()"
    monkeypatch.setattr(server, "command", lambda port: [sys.executable, "-c", code])
    assert server.serve(port=port, open_browser=False, runs=tmp_path) == 0
    assert (tmp_path / "seen").exists()


def test_the_flags_are_ones_that_streamlit_knows() -> None:
    from streamlit import config

    known = config.get_config_options()
    assert not [name for name in server.FLAGS if name not in known]
    assert json.loads(server.FLAGS["server.headless"]) is True
