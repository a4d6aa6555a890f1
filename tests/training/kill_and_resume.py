"""Kill a training run at random moments, resume it each time, and compare its end with that of an unbroken run.

    python tests/training/kill_and_resume.py --kills 300

The test suite does it a few times; this script as often as one likes.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = """
import sys
from pathlib import Path

import torch

from workbench.store import new_run
from workbench.training import loop
from workbench.training.checkpoints import load
from workbench.training.recipes import find_recipe

torch.set_num_threads(1)
loop.STATE_SECONDS = 0.02
root = Path(sys.argv[1])
settings = ["p=13", "d_model=16", "d_head=4", "d_mlp=32", "steps=400", "stop_when_clean=false", "batch_size=32"]
if (root / "broken" / "state").is_dir() and any((root / "broken" / "state").glob("*.json")):
    run = load("broken", runs=root)
    loop.train(run.recipe, run.folder, resume=True)
else:
    import shutil

    shutil.rmtree(root / "broken", ignore_errors=True)
    loop.train(find_recipe("modular-smoke").override(settings), new_run("broken", root))
"""


def kill_and_resume(root: Path, *, kills: int, seed: int) -> int:
    """Train in a child process that is killed `kills` times; returns how many kills hit a live child."""
    rng = random.Random(seed)
    hits = 0
    for _ in range(kills):
        child = subprocess.Popen([sys.executable, "-c", TRAIN, str(root)])
        # Wait until it writes, so that kills fall into the work and not into the imports.
        started = _states(root)
        while child.poll() is None and _states(root) == started:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        hits += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
    finish(root)
    return hits


def finish(root: Path) -> None:
    """Train, or go on, to the end."""
    subprocess.run([sys.executable, "-c", TRAIN, str(root)], check=True)


def final_weights(root: Path) -> bytes:
    """The final checkpoint's bytes."""
    return sorted((root / "broken" / "checkpoints").glob("step_*.safetensors"))[-1].read_bytes()


def log_without_seconds(root: Path) -> list[str]:
    """The training log without wall times."""
    return [line.partition(', "seconds"')[0] for line in (root / "broken" / "metrics.jsonl").read_text().splitlines()]


def _states(root: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in (root / "broken" / "state").glob("step_*.json")))


def main() -> None:
    """Compare a broken run with an unbroken one and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as broken:
        finish(Path(whole))
        rounds, hits, different = 0, 0, 0
        while hits < options.kills:
            with tempfile.TemporaryDirectory(dir=broken) as root:
                hits += kill_and_resume(Path(root), kills=5, seed=options.seed + rounds)
                rounds += 1
                same = final_weights(Path(root)) == final_weights(Path(whole))
                same &= log_without_seconds(Path(root)) == log_without_seconds(Path(whole))
                different += not same
    sys.stdout.write(f"{hits} kills in {rounds} runs: {different} ended differently from the unbroken run\n")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
