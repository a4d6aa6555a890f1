"""`workbench …`: parse, call one command, print what it found.

A command returns a `Printout`: one JSON object and the same as text. With `--json` standard output holds the object
and nothing else; progress goes to standard error. Only a WorkbenchError is the user's: one line, exit code 2. This
module and the parser import nothing heavy, so that help answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from apps.doctor import collision_message, intruders

if TYPE_CHECKING:
    from apps.printing import Printout

INTERRUPTED = 130
Add = Callable[..., argparse.ArgumentParser]
"""Name, summary and, where it has another name, its function -> a command's parser."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code says whose mistake an error was."""
    options = build_parser().parse_args(arguments)
    if found := intruders():
        # Before anything of ours is imported: what would be imported may not be ours.
        print(f"workbench: {collision_message(found)}", file=sys.stderr)
        return 2
    from workbench.runtime import WorkbenchError, is_main_process
    from workbench.store import to_json

    command: Callable[[argparse.Namespace], Printout] = getattr(import_module(f"apps.{options.room}"), options.function)
    try:
        printout = command(options)
    except WorkbenchError as error:
        print(f"workbench {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"workbench {options.command}: interrupted. {error}".rstrip(), file=sys.stderr)
        return INTERRUPTED
    if is_main_process():
        print(to_json(printout.content) if options.json else printout.text)
    return printout.exit_code


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    parser = _Parser(prog="workbench", description="Train small transformers and take them apart.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(room: str, name: str, summary: str, *, function: str | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(room=room, function=function or name)
        command.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        command.add_argument("--runs", type=Path, help="runs folder (default: $WORKBENCH_RUNS or ./runs)")
        return command

    _add_training(partial(add, "commands"))
    _add_analyses(partial(add, "analysis_commands"))
    _add_results(partial(add, "commands"))
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and where help is, and exit with 2."""
        print(f"{self.prog}: {message}. See `{self.prog} --help`.", file=sys.stderr)
        raise SystemExit(2)


def _add_training(add: Add) -> None:
    """Commands that train, and those that tell what is there."""
    app = add("app", "open the workbench in the browser, on 127.0.0.1")
    app.add_argument("--port", type=int, default=8501)
    app.add_argument("--no-browser", action="store_true", help="do not open a browser window")

    add("recipes", "list what can be trained")

    train = add("train", "train a recipe, or your own from file.py:function")
    train.add_argument("recipe")
    train.add_argument("--run", help="name of the run (default: the recipe's)")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field; repeatable")
    train.add_argument("--seed", type=int, help="one seed for world, initial weights and batches")
    train.add_argument("--resume", action="store_true", help="go on with the run that is there")
    train.add_argument("--no-measures", action="store_true", help="leave the progress measures for later")

    finetune = add("finetune", "teach a base one of its skills: a donor for grafts")
    _add_teaching(finetune)
    finetune.add_argument("--run", help="name of the run (default: the base's recipe, task and way)")
    finetune.add_argument("--seed", type=int, default=0, help="of the batches")
    finetune.add_argument("--resume", action="store_true", help="go on with the donor that is there")

    sweep = add("sweep", "train a recipe with many seeds, settings or variants, and compare when they generalise")
    sweep.add_argument("recipe")
    sweep.add_argument("--seeds", default="0..2", metavar="0..2|0,3,7", help="default: 0..2")
    sweep.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE[,VALUE…]", help="a setting's values; repeatable"
    )
    sweep.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME[: KEY=VALUE …]",
        help="a named bundle of settings, to be compared with the others; repeatable",
    )
    sweep.add_argument(
        "--engine", help="turn, processes, batched or ray (default: in turn; in processes if there are several workers)"
    )
    sweep.add_argument("--workers", type=int, help="runs trained at a time; several have one thread each")
    sweep.add_argument("--address", help="of a Ray cluster (default: $RAY_ADDRESS, or one on this machine)")
    sweep.add_argument("--name", help="of the sweep, with which the names of its runs begin (default: the recipe's)")
    sweep.add_argument("--out", type=Path, help="also write tables and figures into this folder")

    add("runs", "list runs and the gallery")
    add("show", "one run: recipe, landmarks, checkpoints, results").add_argument("run")


def _add_analyses(add: Add) -> None:
    """Commands of `apps.analysis_commands`."""
    lens = add("lens", "logit lens, or the tuned lens beside it")
    _add_run(lens)
    _add_engine(lens)
    lens.add_argument("--kind", choices=("logit", "tuned"), default="logit", help="tuned: fitted, and both compared")
    lens.add_argument("--n", type=int, help="pairs to average over (default: 64; tuned: 1000, or all there are)")
    lens.add_argument("--split", default="test")

    probe = add("probe", "what each place tells of the task's latents, and what answers lose without")
    _add_run(probe)
    _add_engine(probe)
    probe.add_argument("--latent", help="its name; of a search also reachability (default: all there are)")
    probe.add_argument("--sites", default="resid_post", help="kinds or sites, comma-separated")
    probe.add_argument("--positions", help="comma-separated, from 0 (default: all)")
    probe.add_argument("--n", type=int, default=1000, help="prompts, or all that the split has")
    probe.add_argument("--split", default="test")

    fourier = add("fourier", "Fourier analysis and progress measures")
    _add_run(fourier)
    _add_engine(fourier)

    patch = add("patch", "activation patching over sites and positions")
    _add_run(patch)
    _add_engine(patch)
    _add_pairs(patch)
    patch.add_argument(
        "--sites", default="resid_pre,attn_out,mlp_out,z,sums,codes", help="kinds or sites, comma-separated"
    )
    patch.add_argument("--direction", choices=("denoise", "noise", "both"), default="both")
    patch.add_argument("--metric", default="logit_difference")

    circuit = add("circuit", "find a circuit and judge it")
    _add_run(circuit)
    circuit.set_defaults(engine=None, workers=None, address=None)
    _add_pairs(circuit)
    circuit.add_argument(
        "--method", default="eap-ig", help="exact, eap, eap-ig, eap-ig-activations, acdc, greedy, mask, ifr"
    )
    circuit.add_argument("--edges", type=int, help="how many to keep (default: the fewest that do the task)")
    circuit.add_argument("--threshold", type=float, help="instead: the least score to keep, for acdc the metric's loss")
    circuit.add_argument("--ablation", choices=("resample", "mean", "zero"), default="resample")
    circuit.add_argument("--metric", default="logit_difference")
    circuit.add_argument(
        "--signed", action="store_true", help="rank by signed scores: edges that help, not those that hurt"
    )
    circuit.add_argument(
        "--select", choices=("top", "grow"), default="top", help="the largest scores, or grown from the logits"
    )
    circuit.add_argument(
        "--granularity", choices=("component", "inputs", "positions"), default="component",
        help="inputs: token and position apart; positions: every edge at every position, too",
    )  # fmt: skip
    circuit.add_argument("--seed", type=int, default=0, help="of the pairs and of what is drawn at random")
    circuit.add_argument(
        "--seeds",
        metavar="RUN[,RUN…]",
        help="further runs of the recipe: the circuits' means over all, what they share",
    )
    circuit.add_argument("--out", type=Path, help="also write the circuit: .json, .eap.json, .pt, .graphml or .dot")

    compare = add("compare", "several runs on the same examples: accuracies, and differences from the first")
    compare.add_argument("run", help="with which the others are compared")
    compare.add_argument("others", nargs="+", metavar="RUN", help="runs whose tasks have the same tests")
    compare.add_argument("--checkpoint", type=int, metavar="STEP", help="of each (default: the last)")

    reason = add("reason", "what a composition or comparison run has formed: latents, causes, hops")
    _add_run(reason)
    _add_engine(reason)
    reason.add_argument("--n", type=int, default=300, help="prompts of each split to average over")

    decompile = add("decompile", "a Transformer Program as Python, RASP or a graph that says the same")
    _add_run(decompile)
    decompile.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="where to write it: .py, .rasp, or .dot for its graph"
    )
    decompile.add_argument("--fast", action="store_true", help="a .py that runs many sequences at once, with NumPy")
    decompile.add_argument(
        "--budget", type=float, default=0.0, help="accuracy that may be lost to a shorter module (default: 0, none)"
    )

    prove = add("prove", "a Transformer Program against its task, on all sequences of each length, by a solver")
    _add_run(prove)
    prove.add_argument("--longest", type=int, help="letters to prove it to (default: as many as a prompt holds)")
    prove.add_argument("--timeout", type=float, default=60.0, help="seconds for each length (default: 60)")

    graft = add("graft", "the few weights that carry a donor's skill, put into the base")
    graft.add_argument("base", help="the run or real model that the donors began with")
    graft.add_argument("donors", nargs="+", metavar="DONOR", help="runs of `workbench finetune`, one task, any seeds")
    graft.add_argument("--foreign", metavar="DONOR", help="a donor of another task, for a control")
    _add_region(graft)
    graft.add_argument("--seed", type=int, default=0, help="of what is drawn")

    localise = add("localise", "donors of several seeds of one task, and whether their skill lies in few weights")
    _add_teaching(localise)
    localise.add_argument("--seeds", default="0..2", metavar="0..2|0,3,7", help="of the donors (default: 0..2)")
    localise.add_argument("--run", help="what the donors are called, before their seeds")
    localise.add_argument("--foreign", metavar="DONOR", help="a donor of another task, for a control")
    _add_region(localise)
    localise.set_defaults(seed=0)

    union = add("union", "the regions of several tasks: how far they coincide, and what a base with all of them can do")
    union.add_argument("base", help="the run or real model that the donors began with")
    union.add_argument("donors", nargs="+", metavar="DONOR", help="two or more runs of `workbench finetune`")
    union.add_argument(
        "--elsewhere", nargs="+", default=[], metavar="DONOR", help="donors of other tasks, to see what is lost there"
    )
    _add_region(union)
    union.add_argument("--seed", type=int, default=0, help="of what is drawn")

    forget = add("forget", "tasks one after the other: what is forgotten, with all weights and with regions kept apart")
    forget.add_argument("base", help="the run that the donors began with")
    forget.add_argument("donors", nargs="+", metavar="DONOR", help="two or more runs of `workbench finetune`, in order")
    forget.add_argument("--seeds", default="0..2", metavar="0..2|0,3,7", help="of the batches (default: 0..2)")
    _add_region(forget)

    trace = add("trace", "whether a search run merges paths: inputs explained, controls, causal test")
    _add_run(trace)
    _add_engine(trace)
    trace.add_argument("--n", type=int, help="test inputs of each lookahead (default: 25)")
    trace.add_argument("--lookahead", type=int, help="one lookahead (default: each)")
    trace.add_argument("--seed", type=int, default=0, help="of the controls")
    trace.add_argument("--graph", help="one of your own instead, without controls: '1>2 2>3 1>4 Q 1 3'")

    card = add("scorecard", "circuit finders against models whose circuit is known")
    card.add_argument("--methods", help="comma-separated (default: all)")
    card.add_argument(
        "--circuits",
        help="comma-separated: names of known circuits, or runs that learnt a Transformer Program (default: the set)",
    )
    card.add_argument("--ablations", help="comma-separated (default: all)")
    card.add_argument("--out", type=Path, help="also write the tables as CSV into this folder")


def _add_results(add: Add) -> None:
    """Commands about benchmarks, models of one's own, reports and this installation."""
    bench = add("bench", "benchmarks: CPU time as a ratio to a named peer")
    bench.add_argument("names", nargs="*", metavar="NAME", help="which (default: all)")
    bench.add_argument("--repeats", type=int, default=7, help="rounds of each; of a race to generalise, seeds")

    imported = add("import", "make a run of your own model and pairs", function="import_model")
    imported.add_argument(
        "model",
        help="state dict with its config, HookedTransformer's, Hugging Face folder, file.py:function; or known:NAME, "
        "a model whose circuit is known, with pairs of its own",
    )
    imported.add_argument("--pairs", type=Path, help="CSV or JSONL: clean, corrupt, answer, distractor")
    imported.add_argument("--vocab", type=Path, help="one token a line; without it prompts are token ids")
    imported.add_argument("--run", help="name of the run (default: the model's file name)")

    report = add("report", "write the report of a run")
    report.add_argument("run")
    report.add_argument("--out", type=Path, help="folder (default: report-NAME)")

    rerun = add("rerun", "rebuild a report from its manifest and compare")
    rerun.add_argument("manifest", type=Path)
    rerun.add_argument("--out", type=Path, help="folder for the rebuilt report (default: beside the manifest)")

    add("doctor", "this installation: versions, device, kernels, name collisions")


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", help="a name in the runs folder, a path, or gallery:NAME")
    command.add_argument("--checkpoint", default=None, metavar="STEP|all", help="default: the last")


def _add_engine(command: argparse.ArgumentParser) -> None:
    """Where an analysis of each checkpoint by itself is done."""
    command.add_argument("--engine", help="with --checkpoint all: turn, processes or ray (default: in this process)")
    command.add_argument("--workers", type=int, help="checkpoints analysed at a time; several have one thread each")
    command.add_argument("--address", help="of a Ray cluster (default: $RAY_ADDRESS, or one on this machine)")


def _add_teaching(command: argparse.ArgumentParser) -> None:
    """A base, what it is taught, and how."""
    command.add_argument(
        "base", help="a run of the recipe skills, gallery:NAME, or a real model: hf:minilm, hf:smollm2, hf:FOLDER/"
    )
    command.add_argument(
        "task", help="tone, topic, ends, repeat; of a real model movies, products, brands, authors, computers"
    )
    command.add_argument("--way", default="l1", help="how: l1 (AdamW with an L1 penalty on the change), adamw, sgd")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field; repeatable")


def _add_region(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", default="learned", help="learned, relaxed, magnitude, saliency, random, …")
    command.add_argument("--density", type=float, default=0.01, help="share of the weights to graft (default: 0.01)")
    command.add_argument("--steps", type=int, default=40, help="of the methods that learn (default: 40)")
    command.add_argument(
        "--examples", type=int, metavar="N", help="of training, to find a region on (default: 1024; of real models 128)"
    )


def _add_pairs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--n", type=int, default=64, help="pairs to average over")
    command.add_argument("--split", default="test")


if __name__ == "__main__":
    sys.exit(main())
