"""A step in bfloat16: matrix products alone, only where a recipe asks for it and the device has it."""

import pytest
import torch
from accelerate import Accelerator

from workbench.kernels import reference
from workbench.runtime import WorkbenchError, has_bfloat16
from workbench.store import new_run
from workbench.training import loop
from workbench.training.loop import Trainer, train
from workbench.training.recipes import find_recipe


@pytest.fixture(autouse=True)
def _any_processor(monkeypatch):
    """What is tested is the same where bfloat16 is emulated."""
    monkeypatch.setattr(loop, "has_bfloat16", lambda device: True)


def tiny(name="modular-smoke", *settings):
    sizes = ["d_model=16", "d_head=4", "d_mlp=32", "steps=60", "stop_when_clean=false"]
    return find_recipe(name).override([*sizes, *settings])


def gradients(recipe, tmp_path):
    trainer = Trainer(recipe, new_run(recipe.trainable().precision, tmp_path), Accelerator(cpu=True))
    trainer.step()
    return torch.cat([each.grad.flatten() for each in trainer.model.parameters()])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("modular-smoke", ["p=13"]),
        ("modular-smoke", ["p=13", "normalization=LN", "loss=stablemax"]),
        ("modular-smoke", ["p=13", "dropout=0.1"]),
        ("composition-smoke", ["batch_size=32"]),
        ("sequences-transformer", ["batch_size=16", "size=200"]),
    ],
)
def test_gradients_are_float32_and_near_those_of_float32(name, settings, tmp_path):
    exact, rounded = (
        gradients(tiny(name, *settings, f"precision={each}"), tmp_path) for each in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.float32
    assert 1e-5 < float((exact - rounded).norm() / exact.norm()) < 0.05


def test_a_run_in_bfloat16_learns_and_logs_what_its_float32_model_does(tmp_path):
    run = train(tiny("modular-smoke", "p=13", "precision=bfloat16"), new_run("a", tmp_path))
    first, last = run.log.rows[0], run.log.rows[-1]
    assert last["train_loss"] < 0.5 * first["train_loss"]
    model, batch = run.model(), run.task.examples("train")
    answers = batch.targets[batch.read]
    logits = model(batch.tokens)[batch.read].double().detach()
    assert float(torch.nn.functional.cross_entropy(logits, answers)) == pytest.approx(last["train_loss"], rel=1e-5)
    assert {each.dtype for each in model.parameters()} == {torch.float32}


def test_a_device_without_it_refuses_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "has_bfloat16", has_bfloat16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    with pytest.raises(
        WorkbenchError, match=r"bfloat16, which this cpu device does not have. Set train.precision=float32"
    ):
        train(tiny("modular-smoke", "p=13", "precision=bfloat16"), new_run("a", tmp_path))
    assert not (tmp_path / "a" / "recipe.json").exists()


@pytest.mark.parametrize(
    ("name", "has"), [("avx512_bf16", True), ("amx_bf16", True), ("bf16", True), ("avx512_f", False)]
)
def test_processors_that_have_it_are_known(name, has, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "any", name: True})
    assert has_bfloat16(torch.device("cpu")) == has


def test_a_program_is_trained_in_float32_alone():
    with pytest.raises(WorkbenchError, match="a Transformer Program is trained in float32"):
        find_recipe("program-smoke").override(["precision=bfloat16"])


def test_attention_on_a_processor_is_never_in_bfloat16():
    q, k, v = (torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    allowed = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reference.attention(q, k, v, allowed), reference.attention(q, k, v, allowed).float())
        assert reference.attention(q.bfloat16(), k, v, allowed).dtype == torch.float32
