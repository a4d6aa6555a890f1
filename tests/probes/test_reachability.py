import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probes import reachability as module
from probes.reachability import LEFT_OUT, NEVER, all_distances, placements, reachability
from workbench.instrument.sites import Edit, Site
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.store import Provenance
from workbench.tasks.base import Batch, join
from workbench.tasks.graph_search import GraphSearch
from workbench.training.search_recipes import search

SITES = tuple(map(Site.parse, ("L0.resid_pre", "L0.resid_post")))
TASK = GraphSearch(size=35, test_size=150)


class Stream:
    """A model whose residual stream is given, whatever it reads; it answers nothing."""

    def __init__(self, states: Sequence[Tensor]) -> None:
        self.states, self.sites = dict(zip(SITES, states, strict=True)), SITES
        self.config = SimpleNamespace(n_steps=1, n_heads=1, d_mlp=0, n_ctx=TASK.size, d_vocab=len(TASK.vocab))
        self.provenance = Provenance(code_version="test", parents=("stream",))

    def forward(self, tokens: Tensor, edits: Mapping[Site, Edit] | None = None) -> Tensor:
        for site, edit in (edits or {}).items():
            edit(self.states[site])
        return torch.zeros(*tokens.shape, len(TASK.vocab))


@pytest.fixture(scope="module")
def batch() -> Batch:
    return join([TASK.examples(split).select(slice(150)) for split in ("test_2", "test_3", "test_4")])


def holding(batch: Batch, farthest: int, *, backward: bool = False) -> Tensor:
    """At every vertex of a prompt the set of what can be reached (or reaches it) within so many edges, and noise."""
    far = all_distances(TASK, batch)
    far = far.mT if backward else far
    reached = (far > 0) & (far <= farthest)
    at = batch.tokens.clamp(max=reached.shape[1] - 1)
    held = reached[torch.arange(len(batch))[:, None], at].float()
    return held + 0.01 * torch.randn(held.shape, generator=generator(0, "noise"))


def noise(batch: Batch) -> Tensor:
    return torch.randn(*batch.tokens.shape, 6, generator=generator(1, "noise"))


def test_what_is_held_is_found_and_no_more(batch: Batch) -> None:
    found = reachability(Stream([noise(batch), holding(batch, 2)]), TASK, batch)
    forward = found.frame[found.frame["direction"] == "forward"]
    held = forward[forward["site"] == "L0.resid_post"]
    assert set(held["distance"]) == {1, 2, 3, 4}
    assert (held[held["distance"] <= 2]["auroc"] == 1).all()
    # Farther away nothing is held.
    beyond = held[held["distance"] > 2]
    assert (beyond["auroc_low"] < 0.52).all()
    assert (beyond["auroc_high"] > 0.48).all()
    assert forward[forward["site"] == "L0.resid_pre"]["auroc"].between(0.3, 0.7).all()
    for row in found.known:
        assert row.auroc.low <= row.auroc.mean <= row.auroc.high
        assert row.n >= module.FEWEST_PROMPTS


def test_backward_is_what_reaches_the_row(batch: Batch) -> None:
    found = reachability(Stream([noise(batch), holding(batch, 7, backward=True)]), TASK, batch).frame
    there = found[(found["site"] == "L0.resid_post") & (found["direction"] == "backward")]
    assert len(there)
    assert (there["auroc"] == 1).all()


def test_a_stream_that_lists_the_graph_knows_nothing_of_paths(batch: Batch) -> None:
    # Which vertices a graph has is the same for all of a prompt's rows: it orders nothing.
    names = torch.arange(TASK.layout.n_names + 1)
    listed = (batch.tokens[:, :, None] == names).any(1).float()[:, None].expand(-1, TASK.size, -1)
    frame = reachability(Stream([noise(batch), listed]), TASK, batch).frame
    assert frame["auroc"].between(0.2, 0.8).all()


def test_the_control_is_learnt_by_heart_where_the_edge_is_told(batch: Batch) -> None:
    # One dimension for each edge: a probe can give every edge labels of its own.
    edge = torch.zeros(*batch.tokens.shape, dtype=torch.long)
    names = TASK.layout.n_names + 1
    pairs = batch.tokens[:, 1:-1] * names + batch.tokens[:, 2:]
    is_edge = batch.tokens[:, :-2] == TASK.layout.edge
    edge[:, 1:-1][is_edge] = pairs[is_edge]
    edge[:, 2:][is_edge] = pairs[is_edge]
    told = torch.nn.functional.one_hot(edge, int(edge.max()) + 1).float()
    frame = reachability(Stream([noise(batch), told]), TASK, batch, untrained=Stream([noise(batch)] * 2)).frame
    there = frame[frame["site"] == "L0.resid_post"]
    assert there["control"].dropna().mean() > 0.9
    assert frame[frame["site"] == "L0.resid_pre"]["control"].mean() < 0.8
    # The untrained model has nothing at any site.
    assert frame["untrained"].mean() == pytest.approx(0.5, abs=0.1)


def test_no_graph_is_on_both_sides(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every prompt six times: the labels of one are those of the others.
    again = batch.select(torch.arange(150, 190).repeat(6))
    test = module._split(TASK, again, 0)
    graphs = [tuple(row) for row in TASK.graphs(again).children.tolist()]
    seen, held = ({graph for graph, is_test in zip(graphs, test, strict=True) if is_test == part} for part in (0, 1))
    assert seen
    assert held
    assert not seen & held
    # A direction of its own for each vertex of each graph, by which a probe learns all of them by heart, and no more.
    kinds = {graph: index for index, graph in enumerate(dict.fromkeys(graphs))}
    code = torch.nn.functional.one_hot(torch.tensor([kinds[graph] for graph in graphs])).float()
    vertex = torch.nn.functional.one_hot(again.tokens, len(TASK.vocab)).float()[..., : TASK.layout.n_names + 1]
    memory = Stream([noise(again), (code[:, None, :, None] * vertex[:, :, None]).flatten(2)])
    frame = reachability(memory, TASK, again).frame
    assert frame[frame["site"] == "L0.resid_post"]["auroc"].mean() < 0.65
    # Mutant: a split by prompt calls the same probe good.
    leaky = torch.rand(len(again), generator=generator(2, "leak")) < 0.25
    monkeypatch.setattr(module, "_split", lambda *_: leaky)
    frame = reachability(memory, TASK, again).frame
    assert frame[frame["site"] == "L0.resid_post"]["auroc"].mean() > 0.95


def test_distances_of_a_graph_worked_by_hand() -> None:
    batch = TASK.prompt("1>2 2>3 1>4 4>3 3>5 Q 1 5")
    far = all_distances(TASK, batch)[0]
    assert far[1, 2:6].tolist() == [1, 2, 1, 3]
    assert far[3, [1, 2, 4, 5]].tolist() == [NEVER, NEVER, NEVER, 1]
    # The graph has no vertex 6, and 0 is no vertex.
    assert far[1, 6] == far[6, 1] == far[0, 1] == LEFT_OUT


def test_placements_worked_by_hand() -> None:
    score = torch.tensor([[0.1, 0.5, 0.5, 0.9, 0.7], [1.0, 2.0, 3.0, 4.0, 5.0]])
    distance = torch.tensor([[NEVER, NEVER, 1, 2, LEFT_OUT], [1, 1, 2, LEFT_OUT, 3]])
    placed = placements(score, distance)
    # One unreachable pair is below 0.5 and one ties; both are below 0.9. The second prompt has none.
    assert placed[0, 2:4].tolist() == [0.75, 1.0]
    assert placed[1].isnan().all()


@given(st.lists(st.tuples(st.integers(-3, 3), st.sampled_from([LEFT_OUT, NEVER, 1, 2])), min_size=2, max_size=12))
def test_placements_are_the_auroc_pair_by_pair(pairs: list[tuple[int, int]]) -> None:
    score = torch.tensor([[float(value) for value, _ in pairs]])
    distance = torch.tensor([[kind for _, kind in pairs]])
    placed = placements(score, distance)[0]
    unreachable = [value for value, kind in pairs if kind == NEVER]
    for (value, _), found in zip(pairs, placed.tolist(), strict=True):
        if unreachable:
            wins = [(value > other) + (value == other) / 2 for other in unreachable]
            assert found == pytest.approx(sum(wins) / len(wins))


def test_the_same_seed_gives_the_same_numbers_and_another_another_split(batch: Batch) -> None:
    model = Stream([noise(batch), holding(batch, 2)])
    first, again, other = (reachability(model, TASK, batch, seed=seed).frame for seed in (0, 0, 1))
    assert first.equals(again)
    assert not first.equals(other)


def test_tables_and_summary_of_a_transformer(batch: Batch) -> None:
    model = Transformer(
        replace(
            search().model,
            n_ctx=TASK.size,
            d_vocab=len(TASK.vocab),
            d_vocab_out=len(TASK.vocab),
            d_model=100,
            pad_token=TASK.pad_token,
        ),
        generator=generator(0, "weights"),
    )
    found = reachability(model, TASK, batch, untrained=model)
    forward, backward, whole = found.tables()
    assert (forward.name, backward.name, whole.name) == (
        "reachability_forward",
        "reachability_backward",
        "reachability",
    )
    assert list(dict.fromkeys(whole.frame["site"])) == ["L0.resid_pre", *(f"L{n}.resid_post" for n in range(3))]
    assert set(whole.frame["side"]) == {"source", "target"}
    assert (whole.frame["untrained"] == whole.frame["auroc"]).all()
    assert found.n_train + found.n_test == len(batch)
    assert "n prompts" in whole.caption
    summary = json.loads(json.dumps(found.summary()))
    assert len(summary["cells"]) == len(whole.frame)
    assert found.provenance == model.provenance


def test_too_few_graphs_are_refused(batch: Batch) -> None:
    few = batch.select(torch.zeros(40, dtype=torch.long))
    with pytest.raises(WorkbenchError, match="These 40 prompts are of 1 different graphs; a probe needs 8 or more"):
        reachability(Stream([noise(few), noise(few)]), TASK, few)
    some = batch.select(slice(16))
    with pytest.raises(WorkbenchError, match="No distance has 20 prompts in the test part, which has 4"):
        reachability(Stream([noise(some), noise(some)]), TASK, some)
