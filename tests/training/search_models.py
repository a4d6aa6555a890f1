"""Prompts and models of graph search for the tests of the tracer, and the tracer's slow version."""

import torch

from circuits.attention_effects import Effects
from circuits.search_prompts import SearchPrompt
from workbench.instrument.passes import run
from workbench.instrument.sites import Site
from workbench.instrument.trace import Patch, Value
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import generator
from workbench.tasks.graph_prompts import PATH, QUERY


def prompt_of(edges, start, goal, layout):
    """The prompt of a graph."""
    return SearchPrompt.read(torch.from_numpy(layout.write_one(edges, (QUERY, start, goal, PATH, start))), layout)


def branches(length, n_branches, layout, *, seed):
    """A start with chains of one length, ids and edges shuffled; the goal ends the first."""
    draw = generator(seed, "branches")
    ids = (torch.randperm(layout.n_names, generator=draw) + 1).tolist()
    start, rest = ids[0], ids[1 : 1 + length * n_branches]
    edges = []
    for chain in (rest[first : first + length] for first in range(0, len(rest), length)):
        edges += list(zip([start, *chain[:-1]], chain, strict=True))
    order = torch.randperm(len(edges), generator=draw).tolist()
    return prompt_of([edges[i] for i in order], start, rest[length - 1], layout)


def random_model(layout, *, n_layers=3, normalization="LN", d_mlp=24, n_heads=1, scale=2.0):
    """An untrained model with everything switched on, its attention sharper than at initialisation."""
    config = ModelConfig(
        n_layers=n_layers,
        d_model=20,
        n_heads=n_heads,
        d_head=20,
        d_mlp=d_mlp,
        n_ctx=layout.size,
        d_vocab=len(layout.vocab),
        d_vocab_out=len(layout.vocab),
        normalization=normalization,
        biases=("attn", "mlp", "unembed"),
        causal=False,
        pad_token=layout.pad,
    )
    draw = generator(0, "random search model")
    model = Transformer(config, generator=draw)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("W_Q", "W_K"):
                parameter *= scale
            if ".b_" in name:
                parameter.normal_(std=0.3, generator=draw)
    return model


def one_pass_an_edit(model, prompt, step, pattern, lead):
    """Every edit of a layer by a whole forward pass of its own, as one row of a batch: what `edit_effects` must equal.

    `lead` is the measure, of final logits and of the residual stream after the last layer.
    """
    last, rows, n = model.config.n_steps - 1, prompt.position, len(prompt)
    places = [Site.parse(f"L{last}.{name}") for name in ("q", "k", "resid_post")]
    raised, zero = pattern.amax(0), torch.tensor(0.0)
    edits = [(value, dest, src) for raise_ in (0, 1) for dest in range(n) for src in range(n)
             for value in (raised[src] if raise_ else zero,)]  # fmt: skip
    site = Site.parse(f"L{step}.pattern")
    patches = [
        Patch(site=site, source=Value(value), rows=torch.tensor([i]), dest=int(rows[dest]), src=int(rows[src]))
        for i, (value, dest, src) in enumerate(edits)
    ]
    trace = run(model, prompt.padded.expand(len(edits), -1), record=places, patches=patches)
    clean = run(model, prompt.padded[None], record=places)
    (q, k, _), (new_q, new_k, resid) = ([each[place] for place in places] for each in (clean, trace))
    q, k, scale = q[0, -1, 0], k[0, rows, 0], q.shape[-1] ** 0.5
    measure = torch.stack([lead(logits, x) for logits, x in zip(trace.logits[:, -1], resid[:, -1], strict=True)])
    return Effects(
        measure=measure.view(2, n, n),
        key_score=(new_k[:, rows, 0] @ q / scale).view(2, n, n, n),
        query_score=(new_q[:, -1, 0] @ k.T / scale).view(2, n, n, n),
    )
