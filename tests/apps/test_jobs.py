"""Jobs live, end, die and are cancelled as real processes, and a reader with nothing but the folder sees it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from apps.ui import jobs
from apps.ui.jobs import Job, find_job, list_jobs, start, start_process
from workbench.runtime import WorkbenchError

WAIT = 30.0

SLEEPER = """
import signal, sys, time
def stop(number, frame):
    print("state saved", file=sys.stderr, flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
print("ready", file=sys.stderr, flush=True)
time.sleep(60)
"""
STUBBORN = """
import signal, sys, time
asked = []
signal.signal(signal.SIGINT, lambda number, frame: sys.exit(130) if asked else asked.append(1))
print("ready", file=sys.stderr, flush=True)
while True:
    time.sleep(0.05)
"""


def python(code: str, runs: Path, *, subject: str = "mine") -> Job:
    return start_process([sys.executable, "-c", code], ["train", "modular-smoke"], subject=subject, runs=runs)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def finish(job: Job) -> Job:
    until(lambda: not job.running)
    return job


@pytest.fixture
def sleeper(tmp_path: Path) -> Job:
    job = python(SLEEPER, tmp_path)
    until(lambda: "ready" in job.tail())
    return job


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path):
    yield
    for job in list_jobs(tmp_path):
        if job.running:
            os.killpg(job.group, signal.SIGKILL)
            finish(job)


def test_a_job_that_ends_well(tmp_path: Path) -> None:
    job = finish(python("import sys; print('{\"steps\": 3}'); print('step 3', file=sys.stderr)", tmp_path))
    assert (job.status, job.exit_code) == ("finished", 0)
    assert job.result == {"steps": 3}
    assert job.tail() == "step 3"
    assert 0 < job.seconds < WAIT


def test_a_job_that_fails_keeps_its_message(tmp_path: Path) -> None:
    job = finish(python("import sys; sys.exit('workbench train: no such recipe')", tmp_path))
    assert (job.status, job.exit_code, job.result) == ("failed", 1, None)
    assert job.tail(1) == "workbench train: no such recipe"


def test_tail_is_the_end_of_a_long_log(tmp_path: Path) -> None:
    code = "import sys; [print('line', n, file=sys.stderr) for n in range(50_000)]"
    job = finish(python(code, tmp_path))
    assert (job.path / "log").stat().st_size > jobs.TAIL_BYTES
    assert job.tail(2) == "line 49998\nline 49999"


def test_cancel_lets_the_command_save(sleeper: Job) -> None:
    assert sleeper.status == "running"
    sleeper.cancel()
    finish(sleeper)
    assert (sleeper.status, sleeper.exit_code) == ("cancelled", 130)
    assert sleeper.tail(1) == "state saved"


def test_cancel_again_stops_what_is_still_saving(tmp_path: Path) -> None:
    job = python(STUBBORN, tmp_path)
    until(lambda: "ready" in job.tail())
    job.cancel()
    time.sleep(0.3)
    assert job.status == "stopping"
    job.cancel()
    assert finish(job).status == "cancelled"


def test_cancel_after_the_end_changes_nothing(tmp_path: Path) -> None:
    job = finish(python("pass", tmp_path))
    job.cancel()
    assert job.status == "finished"


def test_a_job_that_ends_well_although_cancelled_is_finished(tmp_path: Path) -> None:
    code = "import signal, sys; signal.signal(signal.SIGINT, lambda *_: sys.exit(0)); print('ready', file=sys.stderr, "
    job = python(code + "flush=True); signal.pause()", tmp_path)
    until(lambda: "ready" in job.tail())
    job.cancel()
    assert finish(job).status == "finished"


def test_the_command_killed_is_failed_with_its_signal(sleeper: Job) -> None:
    children = Path(f"/proc/{sleeper.group}/task/{sleeper.group}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    finish(sleeper)
    assert (sleeper.status, sleeper.exit_code) == ("failed", -signal.SIGKILL)


def test_all_of_a_job_killed_has_died(sleeper: Job) -> None:
    os.killpg(sleeper.group, signal.SIGKILL)
    finish(sleeper)
    assert (sleeper.status, sleeper.exit_code) == ("died", None)
    assert sleeper.seconds < WAIT


def test_the_command_that_outlives_its_supervisor_still_runs_and_can_be_cancelled(sleeper: Job) -> None:
    os.kill(sleeper.group, signal.SIGKILL)
    time.sleep(0.3)
    assert sleeper.status == "running"
    sleeper.cancel()
    assert finish(sleeper).tail(1) == "state saved"


def test_a_zombie_is_not_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The mutant never reaps; a check for the process id would then say "running" for ever.
    monkeypatch.setattr(jobs.threading.Thread, "start", lambda thread: None)
    waiting: list[subprocess.Popen[bytes]] = []
    spawn = subprocess.Popen
    monkeypatch.setattr(jobs.subprocess, "Popen", lambda *a, **k: waiting.append(spawn(*a, **k)) or waiting[0])
    job = finish(python("pass", tmp_path))
    os.kill(job.group, 0)
    assert job.status == "finished"
    waiting[0].wait()


def test_ended_jobs_are_reaped(tmp_path: Path) -> None:
    job = finish(python("pass", tmp_path))

    def gone() -> bool:
        return not Path(f"/proc/{job.group}").exists()

    until(gone)


def test_another_process_sees_the_job(sleeper: Job, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from apps.ui.jobs import *; print(*[f'{j.id} {j.status}' for j in "
    code += "list_jobs(Path(sys.argv[1]))])"
    seen = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == f"{sleeper.id} running"


def test_the_job_outlives_whoever_started_it(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from apps.ui.jobs import start_process\n"
    code += "start_process([sys.executable, '-c', 'import time; time.sleep(60)'], ['train'], subject='x', "
    code += "runs=Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    [job] = list_jobs(tmp_path)
    assert job.status == "running"
    job.cancel()
    assert finish(job).status == "cancelled"


def test_jobs_are_listed_newest_first_and_by_command(tmp_path: Path) -> None:
    first, second = python("pass", tmp_path, subject="a"), python("pass", tmp_path, subject="b")
    assert list_jobs(tmp_path) == [second, first]
    assert list_jobs(tmp_path, "report") == []
    assert find_job(first.id, tmp_path) == first
    assert list_jobs(tmp_path / "empty") == []


def test_forget_refuses_a_running_job(sleeper: Job, tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="still runs. Cancel it first"):
        sleeper.forget()
    sleeper.cancel()
    finish(sleeper).forget()
    assert list_jobs(tmp_path) == []


@pytest.mark.parametrize(
    "job_id", ["..", "../../etc", "a/b", "", "20260101-000000-abcdef", "20260101-000000-abcdef/.."]
)
def test_ids_cannot_leave_the_folder(job_id: str, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(WorkbenchError, match="No job"):
        find_job(job_id, tmp_path)


def test_a_folder_without_its_card_is_no_job(tmp_path: Path) -> None:
    job = finish(python("pass", tmp_path))
    (job.path / "job.json").unlink()
    assert list_jobs(tmp_path) == []


def test_a_job_whose_card_cannot_be_written_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: dict) -> None:
        groups.append(content["group"])
        raise WorkbenchError("No space left on device.")

    groups: list[int] = []
    monkeypatch.setattr(jobs, "write_json", full)
    with pytest.raises(WorkbenchError, match="No space"):
        python("import time; time.sleep(60)", tmp_path)
    until(lambda: not Path(f"/proc/{groups[0]}").exists())


def test_a_runs_folder_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / ".jobs").write_text("a file")
    with pytest.raises(WorkbenchError, match="Cannot write"):
        python("pass", tmp_path)


def test_jobs_are_values(sleeper: Job) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        sleeper.subject = "other"


def test_the_command_line_runs_as_a_job(tmp_path: Path) -> None:
    job = finish(start(["app", "--port", "0", "--no-browser"], subject="app", runs=tmp_path))
    assert (job.status, job.exit_code, job.kind) == ("failed", 2, "app")
    assert job.tail().startswith("workbench app: Port 0 does not exist")


def test_the_command_gets_the_runs_folder(tmp_path: Path) -> None:
    code = "import json, os; print(json.dumps({'runs': os.environ['WORKBENCH_RUNS']}))"
    assert finish(python(code, tmp_path)).result == {"runs": str(tmp_path.resolve())}
    assert json.loads((list_jobs(tmp_path)[0].path / "job.json").read_text())["subject"] == "mine"
