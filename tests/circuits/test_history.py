"""Checkpoints made by hand, of which it is known when each edge is born and when it vanishes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch

from circuits import controls
from circuits import history as room
from circuits.attribution import exact_scores
from circuits.circuit import Circuit
from circuits.difference import difference
from circuits.discovery import extract, find, score_edges, top_n
from circuits.experiment import Experiment, experiment
from circuits.faithfulness import evaluate
from circuits.graph import circuit_graph
from circuits.history import through_training
from circuits.moments import CircuitHistory
from workbench import load
from workbench.figures import figure
from workbench.intervals import paired_bootstrap
from workbench.models.config import ModelConfig
from workbench.models.planted import PLANTED
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.store import Provenance
from workbench.tasks.base import Batch

COPY = PLANTED["copy"]()
PAIRS = COPY.pairs(16, 0)


def copying(heads: Sequence[int] = (0, 1, 2), *, share: float = 1.0, digest: str = "") -> Transformer:
    """The model that copies, its heads in another order (head 1 copies, head 2 is empty), its head's output scaled."""
    model = Transformer(COPY.model.config, generator=None)
    state = {name: tensor.clone() for name, tensor in COPY.model.state_dict().items()}
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        state[f"weights.0.attn.{name}"] = state[f"weights.0.attn.{name}"][list(heads)]
    state["weights.0.attn.W_O"] *= share
    model.load_state_dict(state)
    model.provenance = Provenance(code_version="0", recipe="by hand", seed=3, parents=(digest,) if digest else ())
    return model.eval()


def history(**fields: object) -> CircuitHistory:
    """Nothing is learnt at step 0; head 1 copies at 10, head 2 at 20, head 1 again at 30 and, less strongly, at 40."""
    models = [
        (0, copying(share=0.0, digest="a")),
        (10, copying(digest="b")),
        (20, copying((0, 2, 1), digest="c")),
        (30, copying(digest="d")),
        (40, copying(share=0.5, digest="e")),
    ]
    graph = circuit_graph(COPY.model, split_inputs=True)
    asked = {"method": "exact", "edges": 2, "graph": graph, "controls": 0, **fields}
    return through_training(models, PAIRS, **asked)  # pyright: ignore[reportArgumentType]


FOUND = history()


def random_model(seed: int, *, width: int = 8) -> Transformer:
    config = ModelConfig(
        n_layers=1, d_model=width, n_heads=2, d_head=4, d_mlp=8, n_ctx=4, d_vocab=6, d_vocab_out=6, normalization="LN"
    )
    return Transformer(config, generator=generator(seed, "history")).eval()


def test_when_each_edge_was_born_and_vanished() -> None:
    rows = {lifetime.edge: lifetime for lifetime in FOUND.lifetimes}
    assert set(rows) == {"embed->a0.h1<v>", "a0.h1->logits", "embed->a0.h2<v>", "a0.h2->logits"}
    first, second = rows["a0.h1->logits"], rows["a0.h2->logits"]
    assert (first.born, first.last, first.vanished, first.spells, first.steps) == (10, 40, None, 2, (10, 30, 40))
    assert (second.born, second.last, second.vanished, second.spells, second.steps) == (20, 20, 30, 1, (20,))
    assert [lifetime.born for lifetime in FOUND.lifetimes] == [10, 10, 20, 20]


def test_a_checkpoint_without_headroom_says_so() -> None:
    empty = FOUND.at(0)
    assert empty.reason is not None
    assert "No headroom: mean logit_difference is 0 on the whole model" in empty.reason
    assert empty.circuit.rule == empty.reason
    assert (empty.circuit.size, empty.headroom, empty.faithfulness, empty.accuracy) == (0, None, None, None)
    assert bool(FOUND.score[0].isnan().all())
    assert bool(FOUND.score[1:].isfinite().all())
    assert all(moment.reason is None for moment in FOUND.moments[1:])


def test_headroom_that_may_be_none_is_no_headroom() -> None:
    """An untrained model's answers differ between prompt and counterfactual, but not in favour of either."""
    models = [(1, random_model(0)), (2, trained_model())]
    found = through_training(models, PAIRS, method="exact", edges=3, controls=0)
    untrained = found.at(1)
    assert untrained.reason is not None
    assert untrained.reason.startswith("Headroom not told from 0: mean logit_difference of the whole model")
    assert untrained.headroom_interval is not None
    low, high = untrained.headroom_interval
    assert low < 0 < high
    assert untrained.circuit.size == 0
    assert untrained.circuit.scores is not None
    assert untrained.model_accuracy is not None
    assert found.at(2).circuit.size > 0
    plan = experiment(models[0][1], PAIRS)
    torch.testing.assert_close(found.score[0].float(), exact_scores(plan).score)
    difference_of_both = found.difference(1, 2)
    assert difference_of_both.gained == found.at(2).circuit.edges
    assert difference_of_both.change is not None


@cache
def trained_model() -> Transformer:
    """One of the same shape, after a few steps of gradient descent on the pairs."""
    model = random_model(1)
    with torch.no_grad():
        for _ in range(60):
            model.zero_grad()
            with torch.enable_grad():
                logits = model.forward(PAIRS.tokens)[PAIRS.read]
                torch.nn.functional.cross_entropy(logits, PAIRS.targets[PAIRS.read]).backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
    return model


def test_numbers_are_those_of_evaluate() -> None:
    graph = circuit_graph(COPY.model, split_inputs=True)
    circuit = extract(COPY.model, PAIRS, method="exact", edges=2, graph=graph)
    judged = evaluate(COPY.model, circuit, PAIRS, controls=5)
    found = history(controls=5)
    moment = found.at(10)
    assert (moment.faithfulness, moment.accuracy) == (judged.faithfulness, judged.accuracy)
    assert moment.random_95 == judged.random_95
    assert moment.random_95 is not None
    assert moment.model_accuracy == judged.model_accuracy == 1
    assert moment.headroom == pytest.approx(judged.whole - judged.empty)
    assert moment.circuit.edges == circuit.edges
    assert FOUND.at(10).random_95 is None


def test_a_size_that_no_random_circuit_has_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "TRIES", 0)
    found = history(controls=5)
    assert [moment.random_95 for moment in found.moments] == [None] * 5
    assert found.at(10).faithfulness is not None


def test_a_threshold_instead_of_a_number() -> None:
    half = float(FOUND.score[4].max())
    found = history(edges=None, threshold=1.2 * half)
    assert [moment.circuit.size for moment in found.moments] == [0, 2, 2, 2, 0]
    assert found.at(40).reason is None
    assert [lifetime.vanished for lifetime in found.lifetimes] == [40, 40, 30, 30]


def test_a_loss_is_restored_downwards() -> None:
    found = history(metric="loss")
    assert found.terms.better == "lower"
    copies = found.at(10)
    assert copies.headroom is not None
    assert copies.headroom < 0
    assert copies.faithfulness is not None
    assert copies.faithfulness.mean == pytest.approx(1, abs=1e-3)
    assert copies.circuit.edges == FOUND.at(10).circuit.edges


def test_signed_scores_leave_out_what_hurts() -> None:
    """With the sign of what the model writes turned, its edges make the answers worse."""
    models = [(0, copying(share=-1.0))]
    absolute, signed = (
        through_training(models, PAIRS, method="exact", threshold=1.0, controls=0, absolute=absolute)
        for absolute in (True, False)
    )
    assert absolute.moments[0].circuit.size == 2
    assert signed.moments[0].circuit.size == 0
    assert signed.moments[0].reason is None


def test_what_is_drawn_at_random_follows_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[object] = []

    def searched(plan: Experiment, **asked: object) -> Circuit:
        seeds.append(asked["seed"])
        return find(plan, **asked)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(room, "find", searched)
    models = [(0, trained_model())]
    first, again, other = (
        through_training(models, PAIRS, method="eap", edges=4, controls=3, seed=seed).moments[0] for seed in (1, 1, 2)
    )
    assert seeds == [1, 1, 2]
    for field in ("headroom_interval", "faithfulness", "random_95"):
        assert getattr(first, field) == getattr(again, field)
        assert getattr(first, field) != getattr(other, field)


def test_what_changed_between_two_checkpoints() -> None:
    found = FOUND.difference(10, 20)
    assert found.gained == ["embed->a0.h2<v>", "a0.h2->logits"]
    assert found.lost == ["embed->a0.h1<v>", "a0.h1->logits"]
    assert found.kept == []
    before, after = (FOUND.at(step).circuit.scores for step in (10, 20))
    assert before is not None
    assert after is not None
    assert before.examples is not None
    assert after.examples is not None
    assert found.change is not None
    assert found.interval is not None
    torch.testing.assert_close(found.change, after.score - before.score)
    torch.testing.assert_close(found.interval, paired_bootstrap(after.examples - before.examples))
    # What one head loses the other gains, example by example.
    torch.testing.assert_close(found.change.sum(), torch.tensor(0.0), atol=1e-3, rtol=0)
    again = FOUND.difference(10, 30)
    assert (again.gained, again.lost, len(again.kept)) == ([], [], 2)
    assert again.change is not None
    assert float(again.change.abs().max()) == 0
    assert found.provenance.parents == ("b", "c")


def test_a_difference_from_nothing_has_no_change_of_scores() -> None:
    found = FOUND.difference(0, 10)
    assert len(found.gained) == 2
    assert found.change is None
    assert found.interval is None
    (table,) = found.tables()
    assert table.kind == "table"
    figure(table)


def test_two_methods_differ_in_edges_but_not_in_scores() -> None:
    plan = experiment(COPY.model, PAIRS)
    exact, greedy = (top_n(score_edges(plan, method), 2) for method in ("exact", "greedy"))
    assert difference(exact, greedy).change is None
    fewer = extract(COPY.model, COPY.pairs(8, 1), method="exact", edges=3)
    found = difference(exact, fewer)
    assert found.change is not None
    assert found.interval is None
    assert difference(exact, replace(exact, scores=None)).change is None
    with pytest.raises(WorkbenchError, match="do not compare"):
        difference(exact, extract(COPY.model, PAIRS, method="exact", edges=2, ablation="zero"))
    other = circuit_graph(COPY.model, split_inputs=True)
    with pytest.raises(WorkbenchError, match="another model's graph"):
        difference(exact, extract(COPY.model, PAIRS, method="exact", edges=2, graph=other))


def test_what_is_shown() -> None:
    tables = {table.name: table for table in FOUND.tables()}
    assert list(tables) == [
        "history_faithfulness",
        "history_headroom",
        "history_scores",
        "history_shares",
        "history_edges",
    ]
    for table in [*tables.values(), *FOUND.difference(10, 20).tables()]:
        figure(table)
        assert "n = 16 examples" in table.caption
    assert "No headroom, and so no circuit, at step 0." in tables["history_scores"].caption
    assert "exact (the 2 largest absolute scores)" in tables["history_edges"].caption
    assert "95th percentile of 0 random" in tables["history_faithfulness"].caption
    scores = tables["history_scores"].frame
    assert scores["checkpoint"].unique().tolist() == ["0", "10", "20", "30", "40"]
    at_the_end = scores.query("checkpoint == '40'")["score"].tolist()
    assert at_the_end == sorted(at_the_end, reverse=True)
    shares = scores.query("edge == 'a0.h1->logits'")["share"].tolist()
    assert math.isnan(shares[0])
    assert shares[1:] == pytest.approx([1, 0, 1, 1], abs=1e-3)
    drawn = tables["history_faithfulness"].frame
    assert set(drawn["series"]) == {"circuit", "accuracy of the circuit", "accuracy of the model"}
    assert len(drawn[drawn["series"] == "circuit"]) == 4
    assert tables["history_edges"].frame["vanished"].tolist() == [None, None, 30, 30]


def test_ranks_have_no_share_of_the_headroom() -> None:
    names = [table.name for table in history(method="greedy").tables()]
    assert "history_scores" in names
    assert "history_shares" not in names


def test_a_history_without_any_circuit_still_has_its_headroom() -> None:
    found = through_training([(0, random_model(0))], PAIRS, method="exact", edges=3)
    assert found.lifetimes == ()
    assert [table.name for table in found.tables()] == ["history_headroom"]
    json.dumps(found.summary(), allow_nan=False)


def test_summary_is_json() -> None:
    summary = json.loads(json.dumps(FOUND.summary(), allow_nan=False))
    assert [row["step"] for row in summary["checkpoints"]] == [0, 10, 20, 30, 40]
    assert summary["checkpoints"][0]["faithfulness"] is None
    assert summary["checkpoints"][2]["edges"] == ["embed->a0.h2<v>", "a0.h2->logits"]
    assert summary["lifetimes"][0]["steps"] == [10, 30, 40]
    changed = json.loads(json.dumps(FOUND.difference(10, 20).summary(), allow_nan=False))
    assert {row["status"] for row in changed["edges"]} == {"gained", "lost"}


def test_provenance_names_every_checkpoint() -> None:
    assert FOUND.provenance == Provenance(code_version="0", recipe="by hand", seed=3, parents=("a", "b", "c", "d", "e"))


def test_progress_is_told_checkpoint_by_checkpoint() -> None:
    told: list[float] = []
    history(on_progress=told.append)
    assert told == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_mistakes_are_refused() -> None:
    with pytest.raises(WorkbenchError, match="at least one checkpoint, and there is none"):
        through_training([], PAIRS, edges=2)
    with pytest.raises(WorkbenchError, match="step 3 came after step 3"):
        through_training([(3, COPY.model), (3, COPY.model)], PAIRS, edges=2)
    with pytest.raises(WorkbenchError, match="another model's graph"):
        through_training([(0, random_model(0)), (1, random_model(0, width=12))], PAIRS, edges=2)
    with pytest.raises(WorkbenchError, match="Unknown method 'exakt'"):
        history(method="exakt")
    with pytest.raises(WorkbenchError, match=r"None of the 2 checkpoints can be looked into. No headroom"):
        through_training([(0, copying(share=0.0)), (1, copying(share=0.0))], PAIRS, edges=2)
    alone = Batch(tokens=PAIRS.tokens, targets=PAIRS.targets, read=PAIRS.read)
    with pytest.raises(
        WorkbenchError, match=r"None of the 1 checkpoints.*needs counterfactual pairs|no counterfactual"
    ):
        through_training([(0, COPY.model)], alone, edges=2)
    with pytest.raises(WorkbenchError, match=r"step 12 was looked at; the nearest is 10. There are 5, from 0 to 40"):
        FOUND.at(12)


def test_a_run_is_looked_at_checkpoint_by_checkpoint() -> None:
    run = load("gallery:modular")
    found = through_training(run, run.task.sample(64, split="test", seed=0), method="eap", edges=9, controls=0)
    assert found.steps == tuple(checkpoint.step for checkpoint in run.checkpoints)
    assert found.provenance.parents == tuple(checkpoint.sha256 for checkpoint in run.checkpoints)
    assert found.moments[0].reason is not None
    last = found.moments[-1]
    assert "m0->logits" in last.circuit.edges
    assert last.model_accuracy == 1
    assert isinstance(last.circuit, Circuit)
