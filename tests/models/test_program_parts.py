"""A program in parts is the program at whole values, and differentiable between them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from program_models import model_of
from torch.autograd import gradcheck

from circuits.components import everything, inputs_of, run_parts
from circuits.graph import circuit_graph
from workbench.models.program_parts import ProgramParts
from workbench.runtime import WorkbenchError, generator
from workbench.tasks.sequences import Sequences

NAMES = ("categorical_heads", "numerical_heads", "categorical_mlps", "numerical_mlps")


def parts_of(function="hist", seed=0, **fields):
    task = Sequences(function=function, letters=3 if function == "reverse" else 2, n_ctx=6, size=20)
    return ProgramParts(model_of(task, seed, **fields)), task


@settings(max_examples=10)
@given(
    seed=st.integers(0, 10_000),
    function=st.sampled_from(["reverse", "hist", "dyck"]),
    layers=st.integers(1, 3),
    sizes=st.tuples(*[st.integers(0, 2)] * 4).filter(lambda sizes: sizes[0] + sizes[1]),
    coded=st.booleans(),
)
def test_the_parts_together_are_the_program(seed, function, layers, sizes, coded):
    columns = {"coded": True, "columns": 2} if coded else {}
    parts, task = parts_of(function, seed, n_layers=layers, **dict(zip(NAMES, sizes, strict=True)), **columns)
    batch = task.examples("train")
    split = {step: [[table] for table in range(parts.config.d_mlp)] for step in range(layers)}
    for clusters in ({}, split if parts.config.d_mlp else {}):
        graph = circuit_graph(parts, split_inputs=True, clusters=clusters)
        inputs = inputs_of(parts, graph, batch.tokens)
        stream = run_parts(parts, graph, batch.tokens, inputs, everything)[1]
        found = parts.finish(stream[batch.read], {})
        torch.testing.assert_close(found, parts.forward(batch.tokens)[batch.read])


def test_a_head_copies_from_each_match_with_the_probability_that_it_is_the_nearest():
    parts, _ = parts_of(numerical_heads=0, categorical_heads=1)
    match = torch.tensor([0.5, 0.25, 1.0, 0.5], dtype=torch.float64)
    root = parts.program.config.cardinality**0.5
    seen = torch.ones(1, 1, 4, dtype=torch.bool)
    found = parts.patterns(0, slice(None), match[None, None] / root, seen, torch.tensor([1]))
    # From position 1: 0 comes first, then 2, which is certain; 3 and the own place are never reached.
    assert found[0, 0].tolist() == [0.5, 0, 0.5, 0]
    seen[..., 2] = False
    found = parts.patterns(0, slice(None), match[None, None] / root, seen, torch.tensor([1]))
    # Then 3, then the own place; nothing matches at all in 3 of 16 cases, and position 0 is copied.
    assert found[0, 0].tolist() == [0.5 + 0.1875, 0.0625, 0, 0.25]


def test_between_values_every_part_has_the_gradient_that_differences_show():
    parts, _ = parts_of("reverse", numerical_heads=1, categorical_heads=1)
    draw = generator(0, "between")
    scores = torch.rand(1, 2, 4, 4, dtype=torch.float64, generator=draw) / 3
    seen = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    places = torch.arange(4)
    assert gradcheck(lambda each: parts.patterns(0, slice(None), each, seen, places), scores.requires_grad_())
    x = 0.1 + 0.8 * torch.rand(1, parts.width, dtype=torch.float64, generator=draw)
    assert gradcheck(lambda each: parts.write_neurons(1, None, each), x.requires_grad_())
    gradient = torch.rand(1, 1, parts.config.n_heads, parts.program.config.cardinality, dtype=torch.float64)
    for slot in ("q", "k", "v"):
        read = parts.read_heads(1, slot, slice(None), x[:, None])
        wanted = torch.autograd.grad(read, [x], gradient[0])[0]
        torch.testing.assert_close(parts.pull_heads(1, slot, x[None], gradient).sum(1), wanted)


def test_a_table_of_numbers_is_interpolated_and_has_the_mean_slope_of_both_sides():
    parts, _ = parts_of(n_layers=1, categorical_heads=0, numerical_heads=1, categorical_mlps=0)
    (table, writes), *_ = parts.tables[0]
    assert table.reads == (1, 1)
    # Codes 5, 4, 3 and so on of 0, 1, 2: the largest of lines.
    codes = np.arange(8.0)
    W_in, W_out = np.zeros((2, 8)), np.zeros((8, 8))
    W_in[0, 0], W_out[0] = 1, -codes
    table = replace(table, W_in=W_in, b_in=np.zeros(8), W_out=W_out, b_out=5 * codes - codes**2 / 2)
    parts.tables[0] = [(table, writes)]
    said = torch.eye(8, dtype=torch.float64)[[5, 4, 3, 2]]
    x = torch.zeros(1, parts.width, dtype=torch.float64)
    x[0, parts.width - 1] = 2.25
    found = parts.write_neurons(0, None, x)[0, writes * 8 : writes * 8 + 8]
    torch.testing.assert_close(found, 0.75 * said[2] + 0.25 * said[3])
    x[0, parts.width - 1] = 2
    slope = torch.autograd.functional.jacobian(lambda each: parts.write_neurons(0, None, each), x)[0, ..., 0, -1]
    torch.testing.assert_close(slope[writes * 8 : writes * 8 + 8], (said[3] - said[1]) / 2)


def test_a_program_without_heads_has_no_circuit():
    with pytest.raises(WorkbenchError, match="each position is read for itself"):
        parts_of(categorical_heads=0, numerical_heads=0)


def test_a_program_with_one_answer_for_all_positions_is_not_taken_apart():
    with pytest.raises(WorkbenchError, match="by the mean of all positions' votes is not taken apart"):
        parts_of(pooled=True)
