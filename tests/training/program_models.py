"""Small Transformer Programs for a task, with weights that nobody trained."""

from workbench.models.program import TransformerProgram
from workbench.models.program_config import ProgramConfig
from workbench.runtime import generator


def config_of(task, **fields):
    """Two layers with one head and one MLP of each kind, but for the fields given."""
    sizes = {"n_layers": 2, "categorical_heads": 1, "numerical_heads": 1, "categorical_mlps": 1, "numerical_mlps": 1}
    return ProgramConfig(
        **{
            **sizes,
            "cardinality": max(8, task.n_ctx),
            "d_mlp": 8,
            "n_ctx": task.n_ctx,
            "d_vocab": len(task.vocab),
            "d_vocab_out": len(task.vocab),
            "outputs": task.outputs,
            "pad_token": task.pad_token,
            "causal": task.causal,
            **fields,
        }
    )


def model_of(task, seed=0, **fields):
    """A model of that shape, by the seed of its weights."""
    return TransformerProgram(config_of(task, **fields), generator=generator(seed, "init"))
