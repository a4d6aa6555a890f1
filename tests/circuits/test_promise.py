"""The lines that a notebook starts with."""

from __future__ import annotations


def test_ten_lines_from_a_run_to_its_circuit() -> None:
    from circuits import evaluate, extract, patch_each
    from probes import logit_lens
    from workbench import load

    grokked = load("gallery:modular")
    model, batch = grokked.model(), grokked.task.sample(64, split="test", seed=0)
    lens = logit_lens(model, batch)
    patches = patch_each(model, batch, sites="resid_pre,attn_out,mlp_out", direction="both")
    circuit = extract(model, batch, method="eap-ig", edges=12)
    verdict = evaluate(model, circuit, batch)
    assert "12 of 23 edges (17 live): faithfulness 0.9" in str(verdict)
    assert verdict.random_95 is not None
    assert verdict.faithfulness.mean > verdict.random_95
    assert lens.n == patches.n == verdict.n == 64
    assert patches.figure() is not None
