"""Page Train: choose a recipe, start it as a process of its own, watch it learn, stop it, go on with it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import streamlit as st

from apps.commands import describe_recipe
from apps.ui import jobs, state
from apps.ui.jobs import Job
from apps.ui.links import link_to
from workbench.figures import figure, with_landmarks
from workbench.runtime import WorkbenchError
from workbench.store import check_run_name, run_names, runs_root
from workbench.training.checkpoints import Run, load
from workbench.training.recipe import Recipe
from workbench.training.recipes import RECIPES, find_recipe

OWN = "my own"
WATCH_SECONDS = 2
RECENT = 50
BADGES = {
    "running": "blue",
    "stopping": "orange",
    "finished": "green",
    "cancelled": "gray",
    "failed": "red",
    "died": "red",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a training is."""

    step: int
    steps: int
    """Most steps that it takes; it may end earlier."""
    seconds_left: float | None
    """Until the last step, at the pace of the latest evaluations."""
    latest: Mapping[str, Any]

    @property
    def share(self) -> float:
        """Done, as a fraction."""
        return min(1.0, self.step / self.steps)


def page() -> None:
    """The page."""
    st.title("Train")
    choice, own = _choose_recipe()
    try:
        recipe = find_recipe(choice) if choice else None
    except WorkbenchError as error:
        st.error(str(error))
        recipe = None
    if recipe is not None:
        _start_form(choice, recipe)
    elif own and not choice:
        st.info("Name a Python file and a function in it that returns a `Recipe`, such as `my_recipes.py:small`.")
    st.header("Trainings", divider="gray")
    known = jobs.list_jobs(kind="train")
    if not known:
        st.info("Nothing was started from here yet. Trainings that you start appear here and can be watched.")
        return
    st.session_state["trainings_run"] = is_running = any(job.running for job in known)
    st.fragment(_watch, run_every=WATCH_SECONDS if is_running else None)()


def _choose_recipe() -> tuple[str, bool]:
    left, right = st.columns([2, 3])
    names = [*RECIPES, OWN]
    name = left.selectbox("Recipe", names, key="recipe", bind="query-params")
    if name != OWN:
        return name, False
    own = right.text_input("Your recipe", key="own", placeholder="my_recipes.py:small", bind="query-params")
    return (own or "").strip(), True


def _start_form(choice: str, recipe: Recipe) -> None:
    st.markdown(recipe.shows)
    card = st.empty()
    left, right = st.columns([3, 1])
    default = free_name(recipe.name, _taken())
    name = left.text_input("Name of the run", value=default, key=f"name:{default}") or ""
    told = "One seed for world, initial weights and batches."
    seed = right.number_input("Seed", min_value=0, value=0, step=1, key="seed", help=told)
    text = st.text_area(
        "Settings",
        key=f"settings:{choice}",
        height=110,
        placeholder="p=59\ntrain.steps=5000",
        help="One key=value a line. All keys, with their values as they would be trained, stand below.",
    )
    settings = setting_lines(text or "")
    changed = _checked(recipe, int(seed), settings, name)
    with card:
        _recipe_card(recipe, changed or recipe)
    arguments = ["train", choice, "--run", name, "--seed", str(seed)]
    arguments += [part for setting in settings for part in ("--set", setting)]
    if st.button("Start training", type="primary", disabled=changed is None, icon=":material/play_arrow:"):
        _show(jobs.start([*arguments, "--json"], subject=name).id)
        st.rerun()
    with st.expander("All settings"):
        st.dataframe(setting_table(recipe, changed or recipe), hide_index=True, key="recipe_settings")
    state.copy_as_python(python_for(choice, name, int(seed), settings))
    st.caption(f"As a command: `workbench {shlex.join(arguments)}`")


def _checked(recipe: Recipe, seed: int, settings: Sequence[str], name: str) -> Recipe | None:
    """The recipe as it would be trained; None, with the reason on the page, if it cannot be."""
    try:
        changed = recipe.with_seed(seed).override(settings)
        check_run_name(name)
        if name in _taken():
            raise WorkbenchError(f"Run {name!r} exists. Choose another name, such as {free_name(name, _taken())!r}.")
    except WorkbenchError as error:
        st.error(str(error))
        return None
    return changed


def _recipe_card(recipe: Recipe, changed: Recipe) -> None:
    minutes = "not measured" if recipe.minutes is None else f"about {recipe.minutes:g} min on 2 cores"
    parameters = describe_recipe(changed)["parameters"]
    st.markdown(f"**{parameters:,}** parameters · expected time, as shipped: **{minutes}**")


def _watch() -> None:
    """The trainings; runs again by itself while one of them does."""
    known = jobs.list_jobs(kind="train")
    if any(job.running for job in known) != st.session_state["trainings_run"]:
        # The whole page: it must begin, or stop, to ask, and the names that are free have changed.
        st.rerun()
    wanted = st.query_params.get("job")
    shown = wanted if wanted in [job.id for job in known] else next((job.id for job in known), None)
    seen: set[str] = set()
    for job in known:
        with st.container(border=True):
            _job(job, is_newest=job.subject not in seen, is_shown=job.id == shown)
        seen.add(job.subject)


def _job(job: Job, *, is_newest: bool, is_shown: bool) -> None:
    status = job.status
    run = _run_of(job)
    progress = None if run is None else progress_of(run)
    title, numbers, buttons = st.columns([3, 4, 3])
    with title:
        st.markdown(f"**{job.subject}** :{BADGES[status]}-badge[{status}]")
        st.caption(f"`{job.arguments[1]}`  \n{clock(job.seconds)}")
    with numbers:
        if is_newest:
            _progress(status, run, progress)
        else:
            st.caption("went on in a later training above")
    with buttons:
        _buttons(job, status, run, is_newest=is_newest)
    if status in ("failed", "died"):
        st.error(job.tail(1) or "It vanished without a word: it was killed, or the machine was restarted.")
    if run is None or not run.log.rows or not is_newest:
        return
    if is_shown:
        _curves(job, run)
    else:
        st.button("Show curves", key=f"show:{job.id}", type="tertiary", on_click=_show, args=[job.id])


def _progress(status: str, run: Run | None, progress: Progress | None) -> None:
    if progress is None or run is None:
        if status == "running":
            st.progress(0.0, text="starting …")
        return
    text = f"step {progress.step:,} of at most {progress.steps:,}"
    if status == "running":
        measuring = " · trained; measuring its checkpoints" if run.status["finished"] else ""
        left = progress.seconds_left
        text += measuring or ("" if left is None else f" · at most {clock(left)} left")
    elif run.status["finished"]:
        text += f" · {run.status['reason']}"
    st.progress(progress.share, text=text)
    row = progress.latest
    st.caption(
        f"train loss {row['train_loss']:.1e}, accuracy {row['train_accuracy']:.1%}  \n"
        f"test loss {row['test_loss']:.1e}, accuracy {row['test_accuracy']:.1%}"
    )


def _buttons(job: Job, status: str, run: Run | None, *, is_newest: bool) -> None:
    # Callbacks, not return values: they run before anything is drawn, and so are not lost when the page runs again.
    with st.container(horizontal=True, horizontal_alignment="right"):
        if status in ("running", "stopping"):
            label = "Cancel" if status == "running" else "Stop at once"
            told = (
                "It saves its state and can go on later." if status == "running" else "Without waiting for it to save."
            )
            st.button(label, key=f"cancel:{job.id}", help=told, on_click=job.cancel)
            return
        if is_newest and run is not None and can_resume(run):
            st.button("Resume", key=f"resume:{job.id}", on_click=_resume, args=[job])
        if run is not None and run.checkpoints:
            link_to("dynamics", "Dynamics", run.reference)
            link_to("runs", "Runs", run.reference)
        told = "Take it off this list; the run stays."
        st.button("", icon=":material/close:", key=f"forget:{job.id}", help=told, on_click=job.forget)


def _resume(job: Job) -> None:
    arguments = ["train", job.arguments[1], "--run", job.subject, "--resume", "--json"]
    with state.user_errors_shown():
        _show(jobs.start(arguments, subject=job.subject).id)


def _show(job_id: str) -> None:
    st.query_params["job"] = job_id


def _curves(job: Job, run: Run) -> None:
    for column, table in zip(st.columns(2), run.log.tables(), strict=True):
        drawn = with_landmarks(figure(table), run.log.landmarks())
        # Two fit side by side into a narrow window if their titles are short.
        drawn.update_layout(height=320, title_text=table.axes["y"].capitalize())
        column.plotly_chart(drawn, key=f"{table.name}:{job.id}", config={"displaylogo": False})


def progress_of(run: Run) -> Progress | None:
    """How far a run is; None before its first evaluation."""
    rows = run.log.rows
    if not rows or run.recipe.train is None:
        return None
    last, steps = rows[-1], run.recipe.train.steps
    earlier = rows[max(0, len(rows) - RECENT)]
    done, seconds = last["step"] - earlier["step"], last["seconds"] - earlier["seconds"]
    left = (steps - last["step"]) * seconds / done if done > 0 and seconds > 0 else None
    return Progress(step=last["step"], steps=steps, seconds_left=left, latest=last)


def can_resume(run: Run) -> bool:
    """Whether there is a state to go on from, and nobody goes on from it already."""
    has_state = any((run.folder.path / "state").glob("step_*.json"))
    return has_state and not run.status["finished"] and not run.folder.busy


def setting_lines(text: str) -> list[str]:
    """What a person typed, a setting a line; empty lines and comments do not count."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def flat_settings(recipe: Recipe) -> dict[str, Any]:
    """Every setting under the key that `--set` knows it by."""
    content = recipe.to_json()
    parts = {part: content[part] for part in ("task", "model", "train") if content[part]}
    left_out = {"task": {"name", "source"}}
    return {
        f"{part}.{key}": value
        for part, fields in parts.items()
        for key, value in fields.items()
        if key not in left_out.get(part, ())
    }


def setting_table(recipe: Recipe, changed: Recipe) -> pd.DataFrame:
    """Every setting as it would be trained, and the recipe's own value where that is another."""
    before = flat_settings(recipe)
    rows = [
        {"setting": key, "value": str(value), "recipe's own": "" if before[key] == value else str(before[key])}
        for key, value in flat_settings(changed).items()
    ]
    return pd.DataFrame(rows)


def free_name(wanted: str, taken: Sequence[str]) -> str:
    """The name, or the name with the first number that is free."""
    number = 2
    name = wanted
    while name in taken:
        name = f"{wanted}-{number}"
        number += 1
    return name


def clock(seconds: float) -> str:
    """A duration as a person says it."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def python_for(choice: str, name: str, seed: int, settings: Sequence[str]) -> str:
    """The training as a script."""
    return (
        "from workbench.store import new_run\n"
        "from workbench.training.loop import train\n"
        "from workbench.training.recipes import find_recipe\n\n"
        f"recipe = find_recipe({choice!r}).with_seed({seed}).override({list(settings)!r})\n"
        f"run = train(recipe, new_run({name!r}))\n"
        "run.log.frame.tail()"
    )


def _taken() -> list[str]:
    """Names in use: runs, and trainings that have not made their folder yet."""
    starting = [job.subject for job in jobs.list_jobs(kind="train") if job.running]
    return [*run_names(), *starting]


def _run_of(job: Job) -> Run | None:
    """The run that a job writes; None before it exists, or once somebody removed it."""
    if not (runs_root() / job.subject / "recipe.json").is_file():
        return None
    try:
        return load(job.subject)
    except WorkbenchError:
        return None
