"""Makes and runs: recipes, tasks, models, training, instrumentation, storage and figures.

Importing this package imports nothing heavy; `load` brings torch when it is first used.
"""

from typing import TYPE_CHECKING

__dist__ = "interp-workbench"
__version__ = "0.1.0"
__all__ = ["load"]

if TYPE_CHECKING:
    from workbench.training.checkpoints import load as load


def __getattr__(name: str) -> object:
    if name == "load":
        from workbench.training.checkpoints import load

        return load
    raise AttributeError(f"module 'workbench' has no attribute '{name}'")
