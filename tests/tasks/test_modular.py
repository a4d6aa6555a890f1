import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.runtime import WorkbenchError
from workbench.tasks.base import Batch, Task, join
from workbench.tasks.modular import Modular, is_prime
from workbench.training.recipes import find_recipe

OPERATIONS = ("add", "sub", "mul", "div")


def by_hand(operation, a, b, p):
    """The answer by search rather than by formula."""
    match operation:
        case "add":
            return (a + b) % p
        case "sub":
            return next(c for c in range(p) if (b + c) % p == a)
        case "mul":
            return sum(a for _ in range(b)) % p
        case "div":
            return next(c for c in range(p) if (b * c) % p == a)


def test_is_a_task():
    assert isinstance(Modular(), Task)


def check_answers(task):
    batch = task.examples("all")
    assert len(batch) == (42 if task.operation == "div" else 49)
    for (a, b, equals), targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        assert equals == 7
        assert targets[2] == by_hand(task.operation, a, b, 7)
    return batch


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_answer(operation):
    batch = check_answers(Modular(operation=operation, p=7, train_fraction=0.5))
    assert batch.read.sum(0).tolist() == [0, 0, len(batch)]
    assert torch.equal(batch.latents["answer"].value, batch.targets[:, 2])
    assert torch.equal(batch.latents["b"].value, batch.tokens[:, batch.latents["b"].position])


class Swapped(Modular):
    """Operands the wrong way round: right for what commutes, wrong for the rest."""

    def answer(self, a, b):
        return super().answer(b, a)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_check_of_answers_can_fail(operation):
    task = Swapped(operation=operation, p=7, train_fraction=0.5)
    if operation in ("add", "mul"):
        check_answers(task)
    else:
        with pytest.raises(AssertionError):
            check_answers(task)


@given(
    operation=st.sampled_from(OPERATIONS),
    p=st.sampled_from([3, 5, 11, 13]),
    fraction=st.floats(0.2, 0.8),
    seed=st.integers(0, 99),
)
def test_splits_partition_the_world(operation, p, fraction, seed):
    task = Modular(operation=operation, p=p, train_fraction=fraction, seed=seed)
    pairs = {split: {tuple(row) for row in task.examples(split).tokens.tolist()} for split in task.splits}
    assert pairs["train"].isdisjoint(pairs["test"])
    assert pairs["train"] | pairs["test"] == pairs["all"]
    assert len(pairs["train"]) == round(fraction * len(pairs["all"]))


def test_seed_chooses_the_split():
    splits = [Modular(p=11, seed=seed).examples("train").tokens for seed in (0, 0, 1)]
    assert torch.equal(splits[0], splits[1])
    assert not torch.equal(splits[0], splits[2])


@given(operation=st.sampled_from(OPERATIONS), kind=st.sampled_from(Modular.contrasts), seed=st.integers(0, 99))
def test_a_counterfactual_changes_exactly_one_operand_and_the_answer(operation, kind, seed):
    task = Modular(operation=operation, p=7, train_fraction=0.5)
    whole = task.examples("all")
    batch = task.contrast(whole, kind, seed=seed)
    changed = batch.tokens != batch.corrupt
    assert (changed.sum(1) == 1).all()
    assert not changed[:, 2].any()
    if kind != "operand":
        assert changed[:, "ab".index(kind)].all()
    for (a, b, _), distractor in zip(batch.corrupt.tolist(), batch.distractor.tolist(), strict=True):
        assert distractor[2] == by_hand(operation, a, b, 7)
    assert (batch.distractor[:, 2] != batch.targets[:, 2]).all()
    assert batch.dropped + len(batch) == len(whole)


def test_pairs_without_headroom_are_dropped_and_counted():
    task = Modular(operation="mul", p=5, train_fraction=0.5)
    # Whatever a is, a * 0 is 0: changing a changes nothing for the 5 pairs with b = 0.
    assert task.contrast(task.examples("all"), "a").dropped == 5
    assert Modular(p=5, train_fraction=0.5).contrast(Modular(p=5).examples("all"), "a").dropped == 0


def test_sample_is_seeded_distinct_and_counts_what_it_passed_over():
    task = Modular(operation="mul", p=5, train_fraction=0.4)
    first, again, other = (task.sample(8, split="test", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.corrupt, again.corrupt)
    assert not torch.equal(first.tokens, other.tokens)
    assert len({tuple(row) for row in first.tokens.tolist()}) == 8
    assert len(first) == 8
    assert any(task.sample(8, split="test", seed=seed).dropped for seed in range(5))


def test_every_kind_of_operand_is_drawn():
    batch = Modular(p=11).contrast(Modular(p=11).examples("all"))
    changed = (batch.tokens != batch.corrupt).double().mean(0)
    assert 0.3 < changed[0] < 0.7


@given(st.sampled_from(OPERATIONS), st.integers(0, 12), st.integers(1, 12))
def test_prompts_read_back(operation, a, b):
    task = Modular(operation=operation, p=13)
    batch = task.prompt(task.decode([a, b, 13]))
    assert batch.tokens.tolist() == [[a, b, 13]]
    assert batch.targets[0, 2] == by_hand(operation, a, b, 13)


@pytest.mark.parametrize(
    ("operation", "text", "message"),
    [
        ("add", "3 + 13 =", "Token 13 is outside the vocabulary: residues go from 0 to 12"),
        ("add", "3 * 5", "Write it like '3 \\+ 5 ='"),
        ("add", "three", "Cannot read 'three' as a prompt"),
        ("add", "-3 + 5", "Cannot read"),
        ("div", "3 / 0", "Division by 0 has no answer"),
    ],
)
def test_bad_prompts(operation, text, message):
    with pytest.raises(WorkbenchError, match=message):
        Modular(operation=operation, p=13).prompt(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"p": 1}, "Modulus p must be at least 3, got 1"),
        ({"p": -5}, "at least 3"),
        ({"train_fraction": 0.0}, "between 0 and 1, both excluded, got 0.0"),
        ({"train_fraction": 1.0}, "both excluded, got 1.0"),
        ({"p": 3, "train_fraction": 0.01}, "leaves a split empty"),
        ({"operation": "div", "p": 12}, "needs a prime modulus, got p=12"),
        ({"operation": "pow"}, "operation=pow is none of"),
    ],
)
def test_worlds_that_cannot_be_are_refused_on_the_command_line(fields, message):
    settings = [f"task.{key}={value}" for key, value in fields.items()]
    with pytest.raises(WorkbenchError, match=message):
        find_recipe("modular").override(settings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"p": 1}, "Modulus p must be at least 3, got 1. Try p=113"),
        ({"p": 2}, "at least 3, got 2"),
        ({"train_fraction": 0.0}, "both excluded, got 0.0"),
        ({"train_fraction": 1.0}, "both excluded, got 1.0"),
        ({"p": 3, "train_fraction": 0.99}, "leaves a split empty"),
        ({"operation": "div", "p": 9}, "Division needs a prime modulus, got p=9"),
        ({"operation": "pow"}, "Unknown operation 'pow'"),
    ],
)
def test_and_in_code(fields, message, monkeypatch):
    # The tests' type checker would be first with the operation; users run without it.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(WorkbenchError, match=message):
        Modular(**fields)


def test_other_operations_live_with_a_composite_modulus():
    assert len(Modular(operation="mul", p=9).examples("all")) == 81


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda task: task.examples("validation"), "Unknown split 'validation'"),
        (lambda task: task.contrast(task.examples("all"), "c"), "Unknown contrast 'c'"),
        (lambda task: task.sample(10_000, split="test"), "Asked for 10000 examples of split 'test', which has 118"),
        (lambda task: task.sample(0, split="test"), "Ask for 1 to that"),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(WorkbenchError, match=message):
        call(Modular(p=13))


def test_batches_check_themselves_and_join(monkeypatch):
    batch = Modular(p=5, train_fraction=0.5).sample(4, split="all")
    whole = join([batch.select(slice(0, 1)), batch.select(slice(1, 4))])
    assert torch.equal(whole.tokens, batch.tokens)
    assert torch.equal(whole.latents["a"].value, batch.latents["a"].value)
    with pytest.raises(WorkbenchError, match="corrupt and distractor together"):
        Batch(tokens=batch.tokens, targets=batch.targets, read=batch.read, corrupt=batch.corrupt)
    # Shapes are checked by the tests' type checker first; users run without it.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(WorkbenchError, match="tokens' shape \\(4, 3\\)"):
        Batch(tokens=batch.tokens, targets=batch.targets[:2], read=batch.read)
    pairs = {"corrupt": batch.corrupt, "distractor": batch.distractor}
    for name, what in (("corrupt", "prompts"), ("distractor", "answers")):
        short = {**pairs, name: pairs[name][:, :2]}
        with pytest.raises(WorkbenchError, match=f"Counterfactual {what} must have the clean prompts' shape"):
            Batch(tokens=batch.tokens, targets=batch.targets, read=batch.read, **short)


def test_primes():
    assert [n for n in range(20) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_answers_under_another_latent(operation):
    task = Modular(operation=operation, p=7, train_fraction=0.5)
    batch = task.examples("all")
    values = 1 + torch.arange(len(batch)) % 6
    for latent in ("a", "b", "answer"):
        found = task.with_latent(batch, latent, values)
        assert not found[:, :2].any()
        for (a, b, _), value, answer in zip(batch.tokens.tolist(), values.tolist(), found[:, 2].tolist(), strict=True):
            expected = {"a": (value, b), "b": (a, value)}.get(latent)
            assert answer == (value if expected is None else by_hand(operation, *expected, 7))
        own = task.with_latent(batch, latent, batch.latents[latent].value)
        assert torch.equal(own, batch.targets)


def test_another_latent_must_be_one_of_the_task():
    task = Modular(operation="div", p=7, train_fraction=0.5)
    batch = task.examples("test")
    zeros = torch.zeros(len(batch), dtype=torch.long)
    assert not task.with_latent(batch, "a", zeros).any()
    for latent, values, message in (
        ("b", zeros, "from 1 to 6, got 0 to 0"),
        ("answer", zeros + 7, "from 0 to 6, got 7 to 7"),
        ("a", zeros - 1, "got -1 to -1"),
        ("carry", zeros, "Unknown latent 'carry'"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            task.with_latent(batch, latent, values)
