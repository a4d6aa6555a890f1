"""A server over small runs, and a browser page that fails its test when something went wrong behind the picture."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, expect, sync_playwright

from apps.analyses import measure
from apps.ui import server as serving
from workbench.models.config import ModelConfig
from workbench.models.planted_search import path_doubling
from workbench.models.transformer import Transformer
from workbench.runtime import generator
from workbench.store import new_run, write_json
from workbench.tasks.graph_search import GraphSearch
from workbench.tasks.pairs import Pairs
from workbench.training.checkpoints import save_checkpoint
from workbench.training.loop import train
from workbench.training.recipe import Recipe
from workbench.training.recipes import find_recipe, modular_smoke

START_SECONDS = 60.0
ACTION_MILLISECONDS = 30_000
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Streamlit asks for these beside the page first, and then at the root, where they are.
PROBED = ("/_stcore/health", "/_stcore/host-config")
TROUBLE = ("Traceback", "Warning:", "WARNING", "ERROR", "Exception")


VIEW = """
from apps.ui.state import user_errors_shown
from apps.ui.views import {view}

with user_errors_shown():
    {view}.page()
"""


@dataclass(frozen=True, kw_only=True)
class Server:
    """The pages over one runs folder."""

    url: str
    runs: Path
    log: Path

    def address(self, path: str) -> str:
        """Full address of a page, such as `/explore?run=small`."""
        return self.url + path


def small_recipe() -> Recipe:
    """Addition mod 23: memorises and generalises in a few seconds, with three key frequencies."""
    recipe = modular_smoke().override(["p=23", "train_fraction=0.7", "d_model=48", "d_mlp=128", "d_head=12"])
    assert recipe.train is not None
    return replace(recipe, name="small", train=replace(recipe.train, steps=400))


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with one finished, measured run called `small`."""
    folder = tmp_path_factory.mktemp("runs")
    measure(train(small_recipe(), new_run("small", folder)))
    return folder


TINY = ("d_model=32", "n_heads=2", "d_head=16", "d_mlp=64", "batch_size=128", "warmup_steps=10")
CHAINS = (*TINY, "entities=20", "relations=5", "out_degree=4", "phi=2", "learning_rate=0.004", "evaluate_every=10")
REASONERS = {
    "chains": ("composition-smoke", [*CHAINS, "steps=160"]),
    "looped": ("composition-smoke", [*CHAINS, "steps=20", "schedule=[0,1,0,1]"]),
    "values": ("comparison-smoke", [*TINY, "entities=20", "attributes=2", "values=4", "phi=4", "steps=60"]),
}


@pytest.fixture(scope="session")
def reasoners_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with measured runs on composition (`chains`, and `looped` with shared blocks) and comparison."""
    folder = tmp_path_factory.mktemp("reasoners")
    for name, (recipe, settings) in REASONERS.items():
        measure(train(find_recipe(recipe).override(settings), new_run(name, folder)))
    return folder


@pytest.fixture(scope="session")
def searches_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a short training on graph search (`searching`) and a model that was wired to do it
    (`doubling`), which came untrained to its wires at step 0."""
    folder = tmp_path_factory.mktemp("searches")
    small = find_recipe("search-smoke").override(["steps=40", "evaluate_every=10", "test_size=60", "batch_size=64"])
    train(small, new_run("searching", folder))
    task = small.task
    assert isinstance(task, GraphSearch)
    model = path_doubling(task.layout)
    recipe = Recipe(name="doubling", task=task, model=model.config, train=None, shows="Merges paths by its wires.")
    run = new_run("doubling", folder)
    write_json(run.path / "recipe.json", recipe.to_json())
    untrained = Transformer(model.config, generator=generator(0, "weights"))
    for step, weights in enumerate((untrained, model)):
        save_checkpoint(run, step, weights.state_dict(), ["wired"], dtype=torch.float32)
    return folder


@pytest.fixture
def app_on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs one view without a browser, over a runs folder and with a query in the URL."""

    def start(view: str, runs: Path, **query: str) -> Any:
        from streamlit.testing.v1 import AppTest

        monkeypatch.setenv("WORKBENCH_RUNS", str(runs))
        app = AppTest.from_string(VIEW.format(view=view), default_timeout=120)
        for name, value in query.items():
            app.query_params[name] = value
        return app.run()

    return start


@pytest.fixture
def pairs_folder(tmp_path: Path) -> Path:
    """A runs folder with a model that came with prompt pairs of its user's own: no training, no Fourier basis."""
    task = Pairs(
        vocab=("x", "y", "z", "w"),
        clean=((0, 1, 2), (1, 1, 0), (2, 0, 1)),
        corrupt=((3, 1, 2), (1, 3, 0), (2, 3, 1)),
        answer=(0, 1, 2),
        distractor=(3, 3, 3),
    )
    model = ModelConfig(n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=6, n_ctx=3, d_vocab=4, d_vocab_out=4)
    recipe = Recipe(name="own", task=task, model=model, train=None, shows="A model of one's own.")
    folder = new_run("own", tmp_path)
    write_json(folder.path / "recipe.json", recipe.to_json())
    weights = Transformer(model, generator=generator(0, "weights")).state_dict()
    save_checkpoint(folder, 0, weights, ["imported"], dtype=torch.float32)
    return tmp_path


@pytest.fixture(scope="session")
def server_on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Server]]:
    """Starts the pages over a runs folder; one server for each folder, until the session ends."""
    with contextlib.ExitStack() as stack:
        running: dict[Path, Server] = {}

        def start(runs: Path) -> Server:
            if runs not in running:
                log = tmp_path_factory.mktemp("server") / "log"
                running[runs] = stack.enter_context(_serving(runs, log))
            return running[runs]

        yield start


@pytest.fixture(scope="session")
def server(server_on: Callable[[Path], Server], runs_folder: Path) -> Server:
    """The pages over `runs_folder`."""
    return server_on(runs_folder)


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Playwright's own choice of headless mode is replaced by the one among the flags.
        browser = playwright.chromium.launch(
            executable_path=chromium, args=FLAGS, ignore_default_args=["--headless", "--headless=old"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """A page whose addresses begin at `server`; its test fails on errors in page, console or log, or on a request
    that would leave this machine."""
    with _watched_page(browser, server) as page:
        yield page


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[[Server], Page]]:
    """Opens watched pages on any server."""
    with contextlib.ExitStack() as stack:
        yield lambda server: stack.enter_context(_watched_page(browser, server))


@contextlib.contextmanager
def _watched_page(browser: Browser, server: Server) -> Iterator[Page]:
    context = browser.new_context(base_url=server.url, viewport={"width": 1440, "height": 1000})
    context.set_default_timeout(ACTION_MILLISECONDS)
    expect.set_options(timeout=ACTION_MILLISECONDS)
    problems: list[str] = []

    def only_here(route: Route) -> None:
        if urlsplit(route.request.url).hostname == serving.ADDRESS:
            route.fallback()
        else:
            problems.append(f"request to {route.request.url}")
            route.abort()

    def on_console(message: ConsoleMessage) -> None:
        address = message.location.get("url", "")
        if message.type in ("error", "warning") and not (" 404 " in message.text and address.endswith(PROBED)):
            problems.append(f"console {message.type}: {message.text} ({address})")

    context.route("http*://**/*", only_here)
    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(f"page error: {error}"))
    page.on("console", on_console)
    said = server.log.stat().st_size
    yield page
    context.close()
    logged = server.log.read_text()[said:]
    problems += [line for line in logged.splitlines() if any(word in line for word in TROUBLE)]
    assert not problems, "\n".join(problems) + f"\n\nserver log:\n{logged}"


@contextlib.contextmanager
def _serving(runs: Path, log: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind((serving.ADDRESS, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "apps.cli", "app", "--port", str(port), "--no-browser", "--runs", str(runs)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ})
    try:
        end = time.monotonic() + START_SECONDS
        while not serving.answers(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, f"the server did not come up:\n{log.read_text()}"
            time.sleep(0.1)
        yield Server(url=serving.url(port), runs=runs, log=log)
    finally:
        process.terminate()
        process.wait(10)
