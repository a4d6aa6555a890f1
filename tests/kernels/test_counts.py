"""What the kernels read, write and multiply, counted while they are interpreted, against the least that would do."""

from collections import Counter

import pytest
import torch
from exactness import kernels
from torch import nn

from workbench.kernels import dispatch
from workbench.training.optimisers import AdamW

pytest.importorskip("triton", reason="Triton is published for Linux alone")


@pytest.fixture
def counts(monkeypatch):
    """Bytes loaded and stored, and pairs of numbers multiplied in matrix products."""
    from triton.runtime.interpreter import interpreter_builder

    found = Counter()

    def counting(name, amount):
        real = getattr(interpreter_builder, f"create_{name}")

        def call(*given):
            found[name] += amount(*given)
            return real(*given)

        monkeypatch.setattr(interpreter_builder, f"create_{name}", call)

    def size(pointers):
        return pointers.get_element_ty().primitive_bitwidth // 8

    counting("masked_load", lambda pointers, mask, *_: size(pointers) * int(mask.data.sum()))
    counting("masked_store", lambda pointers, value, mask, *_: size(pointers) * int(mask.data.sum()))
    counting("dot", lambda a, b, *_: a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
    return found


def test_adamw_moves_every_entry_once(counts):
    sizes = (5, 1300, 2048)
    weights = [nn.Parameter(torch.ones(size)) for size in sizes]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    AdamW(weights, lr=1e-3, betas=(0.9, 0.98), weight_decay=1.0, grokfast=(0.98, 2.0)).step()
    # Weights and what is remembered are read and written, gradients read; a program, of 1,024 entries, reads its count
    # and its rate.
    assert counts["masked_store"] == 4 * sum(sizes) * 4
    assert counts["masked_load"] == 4 * sum(sizes) * 5 + 2 * 4 * (1 + 2 + 2)


def test_cross_entropy_multiplies_five_times_where_three_would_do_and_writes_no_logit(counts, monkeypatch):
    from workbench.kernels import fused_cross_entropy

    # Whole blocks, and programs that share nothing, so that only what must be is written.
    monkeypatch.setattr(fused_cross_entropy, "PROGRAMS", 1)
    monkeypatch.setattr(dispatch, "MOST_LOGITS", 0)
    n_rows, width, n_vocab = 64, 32, 96
    x, w = torch.ones(n_rows, width, requires_grad=True), torch.ones(width, n_vocab, requires_grad=True)
    answer = torch.zeros(n_rows, dtype=torch.int64)
    kernels().cross_entropy(x, w, None, answer, torch.float64).sum().backward()
    least = 3 * n_rows * width * n_vocab
    assert counts["dot"] == least * 5 / 3
    # Two numbers a row in float64, and both gradients.
    assert counts["masked_store"] == 16 * n_rows + 4 * (n_rows * width + width * n_vocab)
