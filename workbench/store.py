"""Where things are kept: the run folder, atomic writes, hashes, locks, and results by key.

    runs/<name>/recipe.json            what the run is
                metrics.jsonl          one line an evaluation
                measures.jsonl         one line a checkpoint, measured after the run
                checkpoints/           weights for analysis, each with a JSON card that holds its hash
                state/                 what resuming needs, the last two
                results/<key>/         what analyses found

Every file is written beside its place and moved there, so that a reader sees the old one or the new one. No pickle.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from workbench.runtime import WorkbenchError, code_version, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.tables import Table

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
GALLERY = Path(__file__).parent / "gallery"


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where a result comes from: enough to make it again."""

    code_version: str
    recipe: str | None = None
    """Name of the recipe that the weights come from."""
    seed: int | None = None
    device: str = "cpu"
    kernel: str = "reference"
    """Which implementation of the forward pass computed it."""
    parents: tuple[str, ...] = ()
    """Digests of what it was computed from."""

    def to_json(self) -> dict[str, object]:
        """The fields."""
        return asdict(self)


@runtime_checkable
class Result(Protocol):
    """What an analysis returns."""

    @property
    def provenance(self) -> Provenance:
        """Where the findings come from."""
        ...

    def tables(self) -> Sequence[Table]:
        """The findings as tables."""
        ...

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        ...


@runtime_checkable
class Filed(Protocol):
    """A result that is kept as files, too, besides its tables: a circuit that other tools can read."""

    def files(self) -> Mapping[str, bytes]:
        """File name -> content."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """A run on disk."""

    path: Path
    reference: str
    """How a person calls it: a name, a path, or `gallery:NAME`."""

    @property
    def results(self) -> Path:
        """Where results on this run go: beside it, if the run itself is not ours to write."""
        if self.reference.startswith("gallery:"):
            return runs_root() / ".results" / self.reference.replace(":", "_")
        return self.path / "results"

    def recipe_json(self) -> dict[str, Any]:
        """What the run is.

        Raises:
            WorkbenchError: the file is unreadable.
        """
        return read_json(self.path / "recipe.json")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Lines of a log; none if there is no such file. A last line that was cut short is left out."""
        path = self.path / name
        if not path.exists():
            return []
        complete = path.read_bytes().rpartition(b"\n")[0]
        try:
            return [json.loads(line) for line in complete.splitlines()]
        except ValueError as error:
            raise WorkbenchError(f"{path} is not a log of the workbench: {error}. Train the run again.") from error

    @property
    def busy(self) -> bool:
        """Whether a process is writing the run right now."""
        if not (self.path / ".lock").exists():
            return False
        try:
            with self.lock():
                return False
        except WorkbenchError:
            return True

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for writing; the lock goes with the process.

        Raises:
            WorkbenchError: another process holds it.
        """
        with (self.path / ".lock").open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise WorkbenchError(
                    f"Run {self.reference!r} is being written by another process. Wait for it, or choose another --run."
                ) from error
            yield


def runs_root(root: Path | str | None = None) -> Path:
    """The runs folder: the one given, else $WORKBENCH_RUNS, else ./runs."""
    return Path(root or os.environ.get("WORKBENCH_RUNS") or "runs")


def find_run(reference: str, root: Path | None = None) -> RunFolder:
    """The run that a person names: a name under the runs folder, a path, or `gallery:NAME`.

    Raises:
        WorkbenchError: there is none, or the folder is not a run.
    """
    if reference.startswith("gallery:"):
        names = gallery_names()
        name = reference.removeprefix("gallery:")
        if name not in names:
            raise WorkbenchError(f"No run {name!r} in the gallery. {nearest(name, names)}")
        return RunFolder(path=GALLERY / name, reference=reference)
    is_path = "/" in reference or reference in (".", "..")
    path = Path(reference) if is_path else runs_root(root) / reference
    if not path.is_dir():
        known = [*run_names(root), *(f"gallery:{name}" for name in gallery_names())]
        raise WorkbenchError(f"No run {reference!r} at {path}. {nearest(reference, known)}")
    if not (path / "recipe.json").is_file():
        raise WorkbenchError(f"{path} is not a run: it has no recipe.json. List runs with `workbench runs`.")
    return RunFolder(path=path, reference=reference)


def new_run(name: str, root: Path | None = None) -> RunFolder:
    """The folder for a new run, created.

    Raises:
        WorkbenchError: the name could leave the runs folder, or is taken.
    """
    check_run_name(name)
    path = runs_root(root) / name
    if path.exists() and any(entry.name != ".lock" for entry in path.iterdir()):
        raise WorkbenchError(f"Run {name!r} exists at {path}. Go on with --resume, or choose another --run.")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return RunFolder(path=path, reference=name)


def check_run_name(name: str) -> None:
    """Raise a WorkbenchError unless `name` is a plain folder name."""
    if not NAME.fullmatch(name) or ".." in name:
        raise WorkbenchError(
            f"Run name {name!r} must be letters, digits, '_', '-' and single dots, without '/': "
            "it names a folder inside the runs folder."
        )


def run_names(root: Path | None = None) -> list[str]:
    """Names of the runs in the runs folder, oldest first."""
    folder = runs_root(root)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if (path / "recipe.json").is_file()]
    return [path.name for path in sorted(found, key=lambda path: (path / "recipe.json").stat().st_mtime)]


def gallery_names() -> list[str]:
    """Names of the finished runs that ship with the package."""
    return sorted(path.parent.name for path in GALLERY.glob("*/recipe.json"))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses (full disk, no permission) into the user's error."""
    try:
        yield
    except OSError as error:
        raise WorkbenchError(
            f"Cannot write {path}: {error.strerror or error}. Nothing was half-written; "
            "free space or choose another --runs."
        ) from error


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it to disk, and move it there."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def check_writable(path: Path) -> None:
    """Make the file's folder, and see that something can be written there.

    Raises:
        WorkbenchError: it cannot.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def to_json(content: object) -> str:
    """JSON with no NaN: numbers that are not finite become null."""
    return json.dumps(_finite(content), indent=2, allow_nan=False)


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically."""
    write_atomic(path, (to_json(content) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        WorkbenchError: it is missing or no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WorkbenchError(f"Cannot read {path}: {error}.") from error
    if not isinstance(content, dict):
        raise WorkbenchError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


def digest(content: bytes) -> str:
    """SHA-256 of the content, in hex."""
    return hashlib.sha256(content).hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], card: Mapping[str, object]) -> str:
    """Write tensors as safetensors, then the JSON card beside them that completes and seals them.

    Returns:
        The digest of the tensor file.
    """
    from safetensors.torch import save

    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    sha256 = digest(content)
    write_atomic(path, content)
    write_json(path.with_suffix(".json"), {**card, "sha256": sha256})
    return sha256


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and card, verified.

    Raises:
        WorkbenchError: a file is missing, or the tensors are not those that were written; names file and hashes.
    """
    from safetensors.torch import load

    card = read_json(path.with_suffix(".json"))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WorkbenchError(f"Cannot read {path}: {error.strerror}.") from error
    found = digest(content)
    if found != card.get("sha256"):
        raise WorkbenchError(
            f"{path} is damaged: its SHA-256 is {found[:16]}…, its card says {str(card.get('sha256'))[:16]}…. "
            "Restore the file, or delete it and its card."
        )
    return load(content), card


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """A foreign state dict: safetensors, or torch's own format read without running anything in it.

    Raises:
        WorkbenchError: the file is missing or holds something else.
    """
    import torch
    from safetensors.torch import load

    try:
        if path.suffix.lower() == ".safetensors":
            content = load(path.read_bytes())
        else:
            # Weights that were saved on a GPU are read where there is none.
            content = torch.load(path, weights_only=True, map_location="cpu")
    # Out of a damaged file torch's reader raises nearly anything: IndexError, UnicodeDecodeError, AssertionError, …
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WorkbenchError(f"Cannot read {path} as a state dict: {reason}") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    ):
        raise WorkbenchError(f"{path} is not a state dict: it must map names to tensors.")
    return content


def result_key(function: str, arguments: Mapping[str, object], parents: Sequence[str]) -> str:
    """Answers "was this computed?": the same call, on the same parents, by the same version of the code."""
    content = {"function": function, "arguments": arguments, "parents": list(parents), "code": code_version()}
    return digest(json.dumps(content, sort_keys=True, default=str).encode())[:16]


def save_result(folder: RunFolder, key: str, result: Result) -> Path:
    """Keep a result's tables and summary under its key; the digest of its content lies beside them."""
    path = folder.results / key
    seal = {}
    for table in result.tables():
        content = table.csv().encode()
        write_atomic(path / f"{table.name}.csv", content)
        seal[f"{table.name}.csv"] = digest(content)
    for name, content in result.files().items() if isinstance(result, Filed) else ():
        write_atomic(path / name, content)
        seal[name] = digest(content)
    summary = to_json(result.summary())
    seal["summary.json"] = digest((summary + "\n").encode())
    write_atomic(path / "summary.json", (summary + "\n").encode())
    write_json(path / "result.json", {"provenance": result.provenance.to_json(), "sha256": seal})
    return path


def load_summary(folder: RunFolder, key: str) -> dict[str, Any] | None:
    """The summary kept under a key; None if there is none or what lies there is not what was written."""
    path = kept_result(folder, key)
    return None if path is None else read_json(path / "summary.json")


def kept_result(folder: RunFolder, key: str) -> Path | None:
    """The folder of the result kept under a key; None if there is none or what lies there is not what was written."""
    path = folder.results / key
    if not (path / "result.json").is_file():
        return None
    seal = read_json(path / "result.json")["sha256"]
    intact = all((path / name).is_file() and digest((path / name).read_bytes()) == seal[name] for name in seal)
    return path if intact else None


def _finite(content: object) -> object:
    if isinstance(content, float):
        return content if content == content and abs(content) != float("inf") else None
    if isinstance(content, Mapping):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content
