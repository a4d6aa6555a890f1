"""What every test runs under: shapes checked, one thread, no network, a Chromium where one is needed."""

import os
import shutil
import signal

import hypothesis
import pytest
from jaxtyping import install_import_hook

# Before torch is imported, here and in every process a test starts: the models are tiny, the workers share the cores,
# and sums come out the same however many workers there are. Triton, which others import too, decides at its import
# whether kernels are compiled or interpreted.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    STREAMLIT_BROWSER_GATHER_USAGE_STATS="false",
    TRITON_INTERPRET="1",
    WANDB_MODE="disabled",
)

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Shapes and types are checked at every call, in the packages that hold tensors.
install_import_hook(["workbench", "circuits", "probes"], "beartype.beartype")

# A shared machine stalls now and then, which is no failure; in CI the same examples are drawn every time.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("browser") and find_chromium() is None:
        reason = "no Chromium on PATH: install your system's package `chromium`"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}; CI leaves no test out", pytrace=False)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the system's Chromium; a test that takes it is marked `browser`."""
    path = find_chromium()
    assert path, "a test that takes the fixture `chromium` is marked `browser`"
    return path
