"""Compiled programs: the interpreter's outputs, and a circuit that weights and brute force confirm."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from workbench.instrument.sites import Instrumented
from workbench.models.known import KnownCircuit
from workbench.models.tracr import FIXTURES, CompiledProgram, load_program, load_tracr, tracr_names
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.store import digest

# Layers, heads, d_model, d_head, d_mlp; all edges, those that carry a variable, those that carry anything.
SIZES = {
    "hist": (1, 1, 25, 6, 18, 13, 4, 6),
    "length": (1, 1, 25, 6, 18, 13, 4, 6),
    "count": (1, 1, 24, 5, 18, 13, 4, 6),
    "shift_by": (1, 1, 19, 10, 1, 13, 4, 6),
    "frac_prevs": (2, 1, 17, 10, 1, 32, 5, 8),
    "reverse": (4, 1, 61, 18, 72, 94, 10, 15),
    "sort_unique": (2, 1, 25, 7, 12, 32, 7, 11),
    "sort": (3, 1, 49, 26, 24, 59, 9, 15),
    "sort_freq": (5, 1, 66, 32, 30, 137, 13, 22),
    "count_less_freq": (2, 1, 29, 9, 14, 32, 7, 13),
    "detect": (3, 2, 28, 10, 6, 122, 12, 20),
    "pair_balance": (2, 2, 20, 10, 4, 61, 10, 16),
    "shuffle_dyck1": (6, 2, 41, 9, 146, 431, 24, 40),
    "shuffle_dyck2": (8, 4, 58, 9, 292, 2102, 34, 57),
}
NUMERICAL = {"frac_prevs", "pair_balance"}


def program_says(name: str, tokens: list[str]) -> list[object]:
    """The programs, written again without RASP."""
    n, prefixes = len(tokens), [tokens[: i + 1] for i in range(len(tokens))]
    match name:
        case "hist":
            return [tokens.count(token) for token in tokens]
        case "length":
            return [n] * n
        case "count":
            return [tokens.count("a")] * n
        case "shift_by":
            return [None, *tokens[:-1]]
        case "frac_prevs":
            return [prefix.count("x") / len(prefix) for prefix in prefixes]
        case "reverse":
            return tokens[::-1]
        case "sort" | "sort_unique":
            return sorted(tokens)
        case "sort_freq":
            return sorted(tokens, key=lambda token: -tokens.count(token))
        case "count_less_freq":
            return [sum(tokens.count(token) <= 2 for token in tokens)] * n
        case "detect":
            return [None] * min(n, 2) + ["".join(prefix).endswith("abc") for prefix in prefixes[2:]]
        case "pair_balance":
            return [(prefix.count("(") - prefix.count(")")) / len(prefix) for prefix in prefixes]
        case "shuffle_dyck1" | "shuffle_dyck2":
            balanced = all(
                prefix.count(open_) >= prefix.count(close) and tokens.count(open_) == tokens.count(close)
                for open_, close in ("()", "{}")
                for prefix in prefixes
            )
            return [balanced] * n
    raise AssertionError(name)


def writers_before(model: Transformer, step: int, *, mid: bool = False) -> list[str]:
    heads = range(model.config.n_heads)
    earlier = [name for s in range(step) for name in (*(f"a{s}.h{h}" for h in heads), f"m{s}")]
    return ["embed", "pos", *earlier, *(f"a{step}.h{h}" for h in heads if mid)]


def all_edges(model: Transformer) -> Iterator[str]:
    config = model.config
    for step in range(config.n_layers):
        for head in range(config.n_heads):
            for reader in ("q", "k", "v"):
                yield from (f"{writer}->a{step}.h{head}<{reader}>" for writer in writers_before(model, step))
        yield from (f"{writer}->m{step}" for writer in writers_before(model, step, mid=True))
    yield from (f"{writer}->logits" for writer in writers_before(model, config.n_layers))


def without(model: Transformer, tokens: Tensor, edge: str = "none->none") -> Tensor:
    """The logits where one reader gets the residual stream less what one writer wrote: zero ablation, spelt out."""
    writer, reader = edge.split("->")
    length = tokens.shape[1]
    allowed = (tokens != model.config.pad_token)[:, None, :] | torch.eye(length, dtype=torch.bool)
    wrote = {"embed": model.embed.W_E[tokens], "pos": model.pos_embed.W_pos[:length].expand(len(tokens), -1, -1)}

    def read(name: str) -> Tensor:
        return sum((w for source, w in wrote.items() if (source, name) != (writer, reader)), torch.zeros(()))

    for step in range(model.config.n_layers):
        weights, heads = model.block(step), {}
        for h in range(model.config.n_heads):
            name, attn = f"a{step}.h{h}", weights.attn
            q, k, v = (read(f"{name}<{c}>") @ w[h] for c, w in zip("qkv", (attn.W_Q, attn.W_K, attn.W_V), strict=True))
            scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
            heads[name] = scores.softmax(-1) @ v @ attn.W_O[h]
        wrote |= heads
        assert weights.mlp is not None
        wrote[f"m{step}"] = (read(f"m{step}") @ weights.mlp.W_in).relu() @ weights.mlp.W_out
    return read("logits") @ model.W_U


def blocks_of_weights(program: CompiledProgram) -> tuple[set[str], set[str]]:
    """Structural and constant edges again, from which entries of the matrices are not zero."""
    model = program.model

    def variables(used: Tensor) -> set[str]:
        labels = [program.labels[i] for i in used.nonzero()[:, 0].tolist()]
        return {label if label in program.constants else label.split(":")[0] for label in labels}

    writes = {
        "embed": variables(model.embed.W_E.abs().sum(0)),
        "pos": variables(model.pos_embed.W_pos.abs().sum(0)),
    }
    reads = {"logits": variables(model.W_U.abs().sum(1))}
    for step in range(model.config.n_layers):
        attn, mlp = model.block(step).attn, model.block(step).mlp
        for h in range(model.config.n_heads):
            name = f"a{step}.h{h}"
            reads |= {
                f"{name}<{c}>": variables(w[h].abs().sum(1))
                for c, w in zip("qkv", (attn.W_Q, attn.W_K, attn.W_V), strict=True)
            }
            writes[name] = variables(attn.W_O[h].abs().sum(0))
        assert mlp is not None
        reads[f"m{step}"] = variables(mlp.W_in.abs().sum(1))
        writes[f"m{step}"] = variables(mlp.W_out.abs().sum(0))
    carried = {edge: writes[edge.split("->")[0]] & reads[edge.split("->")[1]] for edge in all_edges(model)}
    structural = {edge for edge, shared in carried.items() if shared - program.constants}
    return structural, {edge for edge, shared in carried.items() if shared} - structural


def test_the_programs_that_ship() -> None:
    assert tracr_names() == sorted(SIZES)
    assert sum(file.stat().st_size for file in FIXTURES.iterdir() if file.is_file()) < 500_000


@pytest.mark.parametrize("name", SIZES)
def test_outputs_are_the_interpreters(name: str) -> None:
    program = load_program(name)
    batch = program.examples()
    logits = program.model(batch.tokens)
    assert program.categorical == (name not in NUMERICAL)
    if program.categorical:
        assert torch.equal(logits.argmax(-1)[batch.read], batch.targets[batch.read])
    else:
        torch.testing.assert_close(logits[..., 0][batch.read], program.outputs[batch.read], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_interpreter_says_what_the_program_means(name: str) -> None:
    program = load_program(name)
    pad, bos = program.model.config.pad_token, program.vocab.index("BOS")
    for row, said in zip(program.tokens.tolist(), program.outputs.tolist(), strict=True):
        inside = [token for token in row if token != pad]
        assert inside[0] == bos
        assert row[len(inside) :] == [pad] * (len(row) - len(inside))
        expected = program_says(name, [program.vocab[token] for token in inside[1:]])
        answers = said[1 : len(inside)]
        given = [None if answer != answer else answer for answer in answers]
        if program.categorical:
            given = [answer if answer is None else program.vocab[int(answer)] for answer in given]
            assert given == [value if value is None else str(value) for value in expected]
        else:
            assert given == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_examples_hold_every_short_input_and_many_long_ones(name: str) -> None:
    program = load_program(name)
    lengths = (program.tokens != program.model.config.pad_token).sum(1) - 1
    letters = len(program.tokens.unique()) - 2
    assert len(program.tokens.unique(dim=0)) == len(program.tokens)
    if name == "sort_unique":
        assert lengths.bincount().tolist() == [0, 5, 20, 60, 120, 120]
    else:
        assert lengths.bincount()[1:5].tolist() == [letters**n for n in range(1, 5)]
        assert (lengths > 4).sum() >= min(200, letters**5 + letters**6)
    assert lengths.max() == program.model.config.n_ctx - 1


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_edges(name: str) -> None:
    program = load_program(name)
    config, (structural, constants) = program.model.config, program.edges()
    edges = set(all_edges(program.model))
    assert SIZES[name] == (
        config.n_layers,
        config.n_heads,
        config.d_model,
        config.d_head,
        config.d_mlp,
        len(edges),
        len(structural),
        len(structural | constants),
    )
    assert structural | constants <= edges


@pytest.mark.parametrize("name", SIZES)
def test_what_tracr_says_of_its_parts_is_in_the_weights(name: str) -> None:
    program = load_program(name)
    structural, constants = program.edges()
    in_weights, constants_in_weights = blocks_of_weights(program)
    assert in_weights == structural
    assert constants_in_weights <= constants
    # Heads that aggregate are wired to read BOS as their default, and the default of every program here is zero.
    by_default = {f"embed->{head}<v>" for head, ports in program.components.items() if "q" in ports} & constants
    assert constants - constants_in_weights <= by_default


def test_edges_by_hand() -> None:
    hist, reverse = load_tracr("hist"), load_tracr("reverse")
    assert hist.structural == {"embed->a0.h0<q>", "embed->a0.h0<k>", "a0.h0->m0", "m0->logits"}
    assert hist.constants == {"embed->a0.h0<v>", "embed->m0"}
    chain = {"a0.h0->m0", "m0->m1", "pos->m1", "m1->m2", "m2->a3.h0<q>", "pos->a3.h0<k>", "embed->a3.h0<v>"}
    assert reverse.structural == {"embed->a0.h0<q>", "embed->a0.h0<k>", *chain, "a3.h0->logits"}


@torch.no_grad()
def effects(known: KnownCircuit) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each edge with the squared error of its ablation at the positions of the program, and at BOS."""
    batch, model = known.pairs(96, 0), known.model.double()
    clean = without(model, batch.tokens)
    torch.testing.assert_close(clean[batch.read], model(batch.tokens)[batch.read])
    for edge in all_edges(model):
        error = (without(model, batch.tokens, edge) - clean).square().sum(-1)
        yield edge, error[batch.read], error[:, 0]


# The third number: softmax is not quite hard, so a few constants move the outputs, by less than anyone would call a
# change. The fourth: they do change the output at BOS, which the program leaves open.
@pytest.mark.parametrize(
    ("name", "changed", "moved", "changed_with_bos"),
    [("hist", 6, 6, 6), ("frac_prevs", 5, 7, 7), ("reverse", 11, 13, 13)],
)
def test_what_zero_ablation_shows_lies_inside_the_truth(
    name: str, changed: int, moved: int, changed_with_bos: int
) -> None:
    known = load_tracr(name)
    found = list(effects(known))
    by_rule = [
        {edge for edge, error, _ in found if error.max() > 1e-3},
        {edge for edge, error, _ in found if error.max() > 1e-20},
        {edge for edge, error, at_bos in found if max(error.max(), at_bos.max()) > 1e-3},
    ]
    assert all(edges <= known.structural | known.constants for edges in by_rule)
    assert [len(edges) for edges in by_rule] == [changed, moved, changed_with_bos]
    if name == "frac_prevs":
        assert by_rule[0] == known.structural
    if name == "reverse":
        # The length is counted with a selector that is always true, so that nothing hangs on what it compares.
        assert known.structural - by_rule[0] == {"embed->a0.h0<q>", "embed->a0.h0<k>"}


@pytest.mark.parametrize("name", SIZES)
def test_pairs(name: str) -> None:
    known = load_tracr(name)
    batch = known.pairs(64, 3)
    corrupt, _ = batch.pairs()
    pad = known.model.config.pad_token
    assert isinstance(known.model, Instrumented)
    assert batch.tokens.shape == (64, known.model.config.n_ctx)
    assert torch.equal(batch.tokens == pad, corrupt == pad)
    assert len((batch.tokens != pad).sum(1).unique()) > 2
    assert (batch.tokens != corrupt).any(1).all()
    assert not (batch.read & (batch.tokens == pad)).any()
    assert not batch.read[:, 0].any()
    again, other = known.pairs(64, 3), known.pairs(64, 4)
    assert torch.equal(batch.tokens, again.tokens)
    assert not torch.equal(batch.tokens, other.tokens)
    if name not in NUMERICAL:
        logits = known.model(corrupt).argmax(-1)
        assert torch.equal(logits[batch.read], batch.pairs()[1][batch.read])


def test_pairs_differ_in_their_answers() -> None:
    batch = load_tracr("hist").pairs(64, 0)
    lengths = batch.read.sum(1)
    _, distractor = batch.pairs()
    changed = ((batch.targets != distractor) & batch.read).any(1)
    assert torch.equal(changed, lengths > 1)


def test_one_input_makes_no_pair() -> None:
    program = load_program("hist")
    alone = replace(program, tokens=program.tokens[:1], outputs=program.outputs[:1])
    with pytest.raises(WorkbenchError, match="no two inputs of one length"):
        alone.pairs(4, 0)


def test_padding_changes_nothing() -> None:
    program = load_program("reverse")
    short = program.tokens[(program.tokens != program.model.config.pad_token).sum(1) == 4]
    torch.testing.assert_close(program.model(short)[:, :4], program.model(short[:, :4]))


def copied(name: str, folder: Path) -> Path:
    for suffix in (".json", ".safetensors"):
        shutil.copy(FIXTURES / f"{name}{suffix}", folder)
    return folder / f"{name}.json"


def test_a_program_of_ones_own_loads_by_its_path(tmp_path: Path) -> None:
    known, shipped = load_tracr(copied("sort", tmp_path)), load_tracr("sort")
    assert known.structural == shipped.structural
    batch = known.pairs(8, 0)
    assert torch.equal(known.model(batch.tokens), shipped.model(batch.tokens))
    assert known.model.provenance.recipe == "tracr-sort"
    assert known.model.provenance.parents == (digest((FIXTURES / "sort.safetensors").read_bytes()),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2 came"),
        ({"labels": ["one"]}, "15 tokens and 1 labels came"),
        ({"vocab": 3}, "'int' object is not iterable"),
        ({"output": "words"}, "'words' is missing"),
        ({"readout": "hist_2"}, r"no residual label is of the variables \['hist_2'\]"),
        ({"components": {"a1.h0": {"q": [], "k": [], "v": [], "out": []}}}, "component a1.h0 .* is not in this model"),
        ({"components": {"m0": {"out": ["one"]}}}, "component m0 .* is not in this model"),
        ({"components": None}, "has no attribute"),
        ({"config": {"n_layers": 0, "biases": []}}, "missing .*required"),
        ({"sha256": "0"}, "is damaged"),
    ],
)
def test_a_damaged_card_is_one_error(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = copied("hist", tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(WorkbenchError, match=message) as caught:
        load_tracr(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("embed.W_E.at", torch.full((1, 2), 9), "has 12 entries at places of shape"),
        ("embed.W_E.at", torch.full((12, 2), 99), "out of bounds"),
        ("embed.W_E.at", torch.full((12, 2), -1), "has 12 entries"),
        ("embed.W_E.value", torch.zeros(3), "has 3 entries"),
        ("examples.outputs", torch.full((540, 9), 99.0), "outside the vocabulary"),
        ("examples.outputs", torch.full((540, 8), 1.0), "examples of shape|Type-check error"),
        ("examples.tokens", torch.full((540, 9), 99), "outside the vocabulary"),
        ("examples.tokens", None, "'examples.tokens' is missing"),
    ],
)
def test_damaged_tensors_are_one_error(key: str, value: Tensor | None, message: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save

    path = copied("hist", tmp_path)
    tensors = load_file(path.with_suffix(".safetensors"))
    tensors = {**tensors, key: value} if value is not None else {k: v for k, v in tensors.items() if k != key}
    content = save(tensors)
    path.with_suffix(".safetensors").write_bytes(content)
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": digest(content)}))
    with pytest.raises(WorkbenchError, match=message):
        load_tracr(path)


def test_no_safetensors_at_all(tmp_path: Path) -> None:
    path = copied("hist", tmp_path)
    path.with_suffix(".safetensors").write_bytes(b"nothing")
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": digest(b"nothing")}))
    with pytest.raises(WorkbenchError, match="no compiled program that can be loaded"):
        load_tracr(path)
    with pytest.raises(WorkbenchError, match=r"Cannot read .*absent\.json"):
        load_tracr(tmp_path / "absent.json")


def test_an_unknown_name_is_one_error() -> None:
    with pytest.raises(WorkbenchError, match="Did you mean 'reverse'"):
        load_tracr("revers")
    with pytest.raises(WorkbenchError, match="Unknown compiled program '../hist'"):
        load_tracr("../hist")


def test_known_circuit_checks_itself() -> None:
    hist = load_tracr("hist")
    fields = {"name": "x", "model": hist.model, "pairs": hist.pairs, "metric": "loss", "about": ""}
    with pytest.raises(WorkbenchError, match=r"Unknown ablations \['noise'\]"):
        KnownCircuit(**fields, structural=frozenset(), ablations=("noise",))
    with pytest.raises(WorkbenchError, match="writer->reader"):
        KnownCircuit(**fields, structural=frozenset({"embed-logits"}))
    with pytest.raises(WorkbenchError, match="not both"):
        KnownCircuit(**fields, structural=frozenset({"a->b"}), constants=frozenset({"a->b"}))
