"""The distribution holds what the tree holds, its lock is what runs, and importing it stays cheap."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DISTRIBUTION = "interp-workbench"
PACKAGES = ("apps", "circuits", "probes", "workbench")

# One of these costs more CPU time than the help of a command may take,
HEAVY = frozenset(
    [
        "kaleido",
        "nnsight",
        "pandas",
        "plotly",
        "scipy",
        "sklearn",
        "streamlit",
        "torch",
        "transformer_lens",
        "transformers",
    ]
)
# and these act when they are imported: they wait until somebody asks for them.
ACTING = frozenset(["IPython", "nnsight", "streamlit", "transformer_lens"])


def lock() -> dict[str, Version]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pins}


def python(code: str, *, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter that does not have the repository's root on its path."""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def imported_by(code: str, *, cwd: Path) -> set[str]:
    """Top-level names that are imported once `code` has ended, be it by `sys.exit`."""
    told = "print(*{name.partition('.')[0] for name in sys.modules})"
    done = python(f"import atexit, sys\natexit.register(lambda: {told})\n{code}", cwd=cwd)
    return set(done.stdout.splitlines()[-1].split())


def test_packages_are_those_of_the_tree() -> None:
    tree = {
        ".".join(init.parent.relative_to(ROOT).parts) for top in PACKAGES for init in (ROOT / top).rglob("__init__.py")
    }
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(tree)
    assert listed == sorted(listed)


def test_every_module_is_in_a_listed_package() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    lost = [
        str(file.relative_to(ROOT))
        for top in PACKAGES
        for file in (ROOT / top).rglob("*.py")
        if ".".join(file.parent.relative_to(ROOT).parts) not in listed
    ]
    assert not lost, "a folder without __init__.py is not shipped"


def test_tests_are_not_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py")), "tests/workbench/__init__.py would be taken for workbench"


def test_names_are_ours_from_anywhere(tmp_path: Path) -> None:
    code = f"""
import importlib, json
print(json.dumps({{name: [m.__dist__, m.__file__] for name in {PACKAGES} for m in [importlib.import_module(name)]}}))
"""
    found = json.loads(python(code, cwd=tmp_path).stdout)
    for name in PACKAGES:
        dist, file = found[name]
        assert dist == DISTRIBUTION, f"{name} comes from {file}"
        assert Path(file).resolve() == ROOT / name / "__init__.py"


def test_version_is_said_once_everywhere() -> None:
    import workbench

    version = PROJECT["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert workbench.__version__ == version
    assert importlib.metadata.version(DISTRIBUTION) == version
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == version
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_no_upload() -> None:
    assert "Private :: Do Not Upload" in PROJECT["project"]["classifiers"]


def test_gallery_ships_with_the_package() -> None:
    assert PROJECT["tool"]["setuptools"]["package-data"]["workbench.gallery"] == ["**/*"]


def test_lock_is_plain_pins() -> None:
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
    assert lock()["torch"] == Version("2.13.0")


def closure(name: str, extras: set[str], seen: set[str]) -> Iterator[str]:
    """Every distribution that `name` with `extras` brings in on this machine."""
    for text in importlib.metadata.requires(name) or ():
        requirement = Requirement(text)
        wanted = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras or {""}
        )
        key = canonicalize_name(requirement.name)
        if not wanted or key in seen:
            continue
        seen.add(key)
        yield key
        # A CUDA build of torch pins what it brings by itself.
        if key != "torch":
            yield from closure(key, requirement.extras, seen)


def test_environment_is_the_lock() -> None:
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not the environment that `make setup` made")
    extras = set(re.search(r"^EXTRAS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split(","))
    assert extras <= set(PROJECT["project"]["optional-dependencies"])
    pins = lock()
    brought = sorted(closure(DISTRIBUTION, extras, set()))
    assert not [name for name in brought if name not in pins], "missing from requirements.lock: run `make lock`"
    differing = {}
    for name in brought:
        # The local part (`+cpu`) says which build of the version this is.
        installed = Version(importlib.metadata.version(name)).public
        if installed != pins[name].public:
            differing[name] = (installed, str(pins[name]))
    assert not differing, "installed and locked versions differ: run `make setup`"


@pytest.mark.parametrize("module", [*PACKAGES, "apps.cli", "workbench.runtime"])
def test_import_is_silent(module: str, tmp_path: Path) -> None:
    done = python(f"import {module}", cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("module", ["apps.cli", "workbench", "workbench.runtime"])
def test_import_is_cheap(module: str, tmp_path: Path) -> None:
    assert not imported_by(f"import {module}", cwd=tmp_path) & HEAVY


@pytest.mark.parametrize("module", ["circuits", "probes"])
def test_import_leaves_the_acting_libraries_alone(module: str, tmp_path: Path) -> None:
    assert not imported_by(f"import {module}", cwd=tmp_path) & ACTING


def test_help_is_cheap(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['workbench', '--help']; from apps.cli import main\nsys.exit(main())"
    assert not imported_by(code, cwd=tmp_path) & HEAVY


def test_documents_hold_no_placeholders() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        lines = (ROOT / name).read_text().splitlines()
        assert not [line for line in lines if re.fullmatch(r"[A-Z_]{4,}|.*\b(TODO|TBD|FIXME)\b.*", line)]
