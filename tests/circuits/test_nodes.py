"""Scores of nodes against numbers worked by hand, single edits, another library's attribution, and the edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import jaxtyping
import pytest
import torch
from torch import Tensor

from circuits.nodes import NodeScores, score_nodes
from circuits.paths import path_patch
from workbench.instrument.adapters import BridgeModel, ModelShape, nnsight_model
from workbench.instrument.sites import Edit, Instrumented, Site, SiteKind
from workbench.metrics import METRICS
from workbench.models.bridges import to_bridge
from workbench.models.config import ModelConfig
from workbench.models.known import ABLATIONS, Ablation
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.store import Provenance
from workbench.tasks.base import Batch

EMBED = Site(kind=SiteKind.embed)


class Squares:
    """Logits are the squares of the embedding, so that every score can be worked by hand."""

    config = ModelShape(n_steps=1, n_heads=1, d_mlp=0, n_ctx=1, causal=True, d_vocab=3)
    sites: Sequence[Site] = (EMBED,)
    provenance = Provenance(code_version="test")

    def forward(self, tokens: Tensor, edits: Mapping[Site, Edit] | None = None) -> Tensor:
        embedded = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])[tokens]
        return (edits or {}).get(EMBED, lambda x: x)(embedded).square()


class Renamed(Squares):
    """The same with its embedding under another name."""

    def __init__(self, site: Site) -> None:
        self.sites = (site,)

    def forward(self, tokens: Tensor, edits: Mapping[Site, Edit] | None = None) -> Tensor:
        [site] = self.sites
        return super().forward(tokens, {EMBED: edits[site]} if edits else {})


def one_token(*clean: int, corrupt: int = 1) -> Batch:
    tokens = torch.tensor(clean)[:, None]
    zero = torch.zeros_like(tokens)
    return Batch(
        tokens=tokens, targets=zero, read=zero == 0, corrupt=torch.full_like(tokens, corrupt), distractor=zero + 1
    )


@pytest.mark.parametrize(
    ("method", "reference", "score"),
    # Clean (2, 0), corrupt (0, 1): from 4 - 0 to 0 - 1. Slopes (4, 0) and (0, -2) times the change (2, -1).
    [("exact", "clean", 5), ("exact", "corrupt", 5), ("attribution", "clean", 8), ("attribution", "corrupt", 2)],
)
def test_scores_worked_by_hand(method: str, reference: str, score: float) -> None:
    found = score_nodes(Squares(), one_token(0), method=method, reference=reference)  # pyright: ignore[reportArgumentType]
    assert found.score.tolist() == [score]
    assert (found.clean, found.ablated) == (4, -1)


@pytest.mark.parametrize(("points", "score"), [(1, 2), (2, 3.5), (5, 4.4)])
def test_a_path_worked_by_hand(points: int, score: float) -> None:
    # At a share s of the clean run (2s, 1 - s), with slopes (4s, -2 + 2s): times the change (2, -1) it is 2 + 6s.
    found = score_nodes(Squares(), one_token(0), method="attribution-ig", points=points)
    assert found.score.tolist() == pytest.approx([score])
    assert (found.clean, found.ablated, found.reference) == (4, -1, "path")
    assert f"left Riemann sum of {points} points on the inputs" in found.rule
    [table] = found.tables()
    assert table.name == "node_scores_attribution_ig"
    assert "taken at the path from the ablated to the clean run" in table.caption
    # Where a model names no embeddings, the path is that of the stream into its first layer.
    stream = Renamed(Site(kind=SiteKind.resid_pre, layer=0))
    again = score_nodes(stream, one_token(0), sites="resid_pre", method="attribution-ig", points=points)
    assert again.score.tolist() == found.score.tolist()


@pytest.mark.parametrize(
    ("method", "ablation", "scores"),
    # Clean (2, 0) and (1, 0): 4 and 1. Zero: 0. Mean (1.5, 0): 2.25. Slopes 4 and 2.
    [
        ("exact", "zero", [4, 1]),
        ("exact", "mean", [1.75, -1.25]),
        ("attribution", "zero", [8, 2]),
        ("attribution", "mean", [2, -1]),
    ],
)
def test_ablations_worked_by_hand(method: str, ablation: Ablation, scores: list[float]) -> None:
    found = score_nodes(Squares(), one_token(0, 2), method=method, ablation=ablation)  # pyright: ignore[reportArgumentType]
    assert found.examples[:, 0].tolist() == scores
    assert float(found.score) == sum(scores) / 2
    assert [float(found.low), float(found.high)] == [min(scores), max(scores)]
    assert found.ablated == {"zero": 0, "mean": 2.25}[ablation]


def transformer(**fields: object) -> Transformer:
    config: dict[str, object] = {
        "n_layers": 2,
        "d_model": 8,
        "n_heads": 2,
        "d_head": 4,
        "d_mlp": 8,
        "n_ctx": 4,
        "d_vocab": 7,
        "d_vocab_out": 7,
        "normalization": "LN",
        "biases": ("attn", "mlp", "unembed"),
        **fields,
    }
    model = Transformer(ModelConfig(**config), generator=generator(0, "nodes"))  # pyright: ignore[reportArgumentType]
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.7, generator=generator(1, name))
    return model.double()


def pairs(n: int = 5, *, padded: bool = False) -> Batch:
    tokens, corrupt, targets = torch.randint(0, 6, (3, n, 4), generator=generator(2, "nodes"))
    read = torch.zeros(n, 4, dtype=torch.bool)
    read[:, 3] = True
    if padded:
        tokens[0, 2:], corrupt[0, 2:], read[0] = 6, 6, torch.tensor([False, True, False, False])
    return Batch(tokens=tokens, targets=targets, read=read, corrupt=corrupt, distractor=(targets + 3) % 6)


def place(site: Site, tensor: Tensor) -> Tensor:
    """The view of a head, a neuron, or everything."""
    if site.head is not None:
        return tensor.select(site.axis("head"), site.head)
    return tensor if site.neuron is None else tensor.select(site.axis("d_mlp"), site.neuron)


def put(site: Site, value: Tensor, tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    place(site, changed).copy_(place(site, value))
    return changed


EVERY = "embed,resid_pre,q,pattern,z,mlp_out,L0.post.n3,ln_final_normalized"


def by_loop(model: Instrumented, batch: Batch, found: NodeScores) -> Tensor:
    """The reference: one pass for each node, with one edit that no other code has a part in."""
    seen: dict[Site, list[Tensor]] = {site.whole: [] for site in found.sites}
    assert batch.corrupt is not None
    for tokens in (batch.tokens, batch.corrupt):
        model.forward(
            tokens, {site: lambda tensor, kept=kept: kept.append(tensor) or tensor for site, kept in seen.items()}
        )
    clean, other = (batch.tokens, 1) if found.reference == "clean" else (batch.corrupt, 0)
    sign = 1 if found.reference == "clean" else -1

    def measured(edits: Mapping[Site, Edit]) -> Tensor:
        return METRICS[found.terms.metric](model.forward(clean, edits)[batch.read], batch)

    scores = [
        sign
        * (measured({}) - measured({site.whole: lambda tensor, site=site: put(site, seen[site.whole][other], tensor)}))
        for site in found.sites
    ]
    return torch.stack(scores, 1).detach().double()


@pytest.mark.parametrize("reference", ["clean", "corrupt"])
@pytest.mark.parametrize("fields", [{}, {"schedule": (0, 1, 0)}, {"normalization": "LN", "causal": False}], ids=str)
def test_exact_scores_are_single_edits(
    fields: dict[str, object], reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = transformer(**fields), pairs()
    found = score_nodes(model, batch, sites=EVERY, metric="loss", reference=reference)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(found.examples, by_loop(model, batch, found), rtol=1e-9, atol=1e-9)
    assert float(found.score.abs().max()) > 1e-2
    for size in ("circuits.nodes.ROWS", "circuits.nodes.LOGITS"):
        monkeypatch.setattr(size, 11)
    again = score_nodes(model, batch, sites=EVERY, metric="loss", reference=reference)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(again.examples, found.examples, rtol=1e-9, atol=1e-9)


def along_the_path(model: Transformer, batch: Batch, found: NodeScores, points: int) -> Tensor:
    """The reference: each point of the path by itself, with edits and gradients that no other code has a part in."""
    assert batch.corrupt is not None
    inputs = [EMBED, Site(kind=SiteKind.pos_embed)]
    whole = {site.whole for site in found.sites} | set(inputs)

    def seen(tokens: Tensor, mixed: Mapping[Site, Tensor] | None = None) -> tuple[dict[Site, Tensor], Tensor]:
        kept: dict[Site, Tensor] = {}

        def keep(site: Site, tensor: Tensor) -> Tensor:
            given = tensor if mixed is None or site not in mixed else mixed[site]
            kept[site] = given if given.requires_grad else given.detach().requires_grad_()
            return kept[site]

        logits = model.forward(tokens, {site: partial(keep, site) for site in whole})
        return kept, METRICS[found.terms.metric](logits[batch.read], batch)

    (clean, _), (other, _) = seen(batch.tokens), seen(batch.corrupt)
    ablated = {
        "resample": other,
        "zero": {site: torch.zeros_like(tensor) for site, tensor in clean.items()},
        "mean": {site: tensor.mean(0, keepdim=True).expand_as(tensor) for site, tensor in clean.items()},
    }[found.terms.ablation]
    slopes = {site: torch.zeros_like(tensor) for site, tensor in clean.items()}
    for point in range(points):
        mixed = {site: ablated[site] + point / points * (clean[site] - ablated[site]) for site in inputs}
        kept, values = seen(batch.tokens, {site: tensor.detach() for site, tensor in mixed.items()})
        gradients = torch.autograd.grad(values.sum(), list(kept.values()), allow_unused=True)
        for site, gradient in zip(kept, gradients, strict=True):
            slopes[site] += 0 if gradient is None else gradient / points
    products = {site: (clean[site] - ablated[site]) * slopes[site] for site in whole}
    return torch.stack([place(site, products[site.whole]).flatten(1).sum(1) for site in found.sites], 1).detach()


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("fields", [{}, {"schedule": (0, 1, 0)}], ids=str)
def test_the_points_of_a_path_are_rows(
    fields: dict[str, object], ablation: Ablation, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = transformer(**fields), pairs()
    found = score_nodes(model, batch, sites=EVERY, metric="loss", method="attribution-ig", points=4, ablation=ablation)
    expected = along_the_path(model, batch, found, 4)
    torch.testing.assert_close(found.examples, expected, rtol=1e-9, atol=1e-9)
    assert float(found.score.abs().max()) > 1e-2
    # A few points at a time give the same.
    monkeypatch.setattr("circuits.nodes.ROWS", 11)
    again = score_nodes(model, batch, sites=EVERY, metric="loss", method="attribution-ig", points=4, ablation=ablation)
    torch.testing.assert_close(again.examples, found.examples, rtol=1e-9, atol=1e-9)


def test_a_path_of_one_point_is_attribution_at_the_corrupt_run() -> None:
    model, batch = transformer(pad_token=6), pairs(padded=True)
    for metric in ("logit_difference", "kl"):
        asked = {"sites": EVERY, "metric": metric}
        path = score_nodes(model, batch, method="attribution-ig", points=1, **asked)
        other = score_nodes(model, batch, method="attribution", reference="corrupt", **asked)
        torch.testing.assert_close(path.examples, other.examples, rtol=1e-9, atol=1e-9)


def test_along_the_whole_path_the_inputs_carry_all_that_is_lost() -> None:
    model, batch = transformer(), pairs()
    found = score_nodes(model, batch, sites="embed,pos_embed", method="attribution-ig", points=2000)
    assert float(found.score.sum()) == pytest.approx(found.clean - found.ablated, rel=2e-2)
    short = score_nodes(model, batch, sites="embed,pos_embed", method="attribution")
    assert float(short.score.sum()) != pytest.approx(found.clean - found.ablated, rel=0.2)


def bridged(model: Transformer) -> Instrumented:
    return BridgeModel(to_bridge(model)[0])


def traced(model: Transformer) -> Instrumented:
    return nnsight_model(model, {site: site.place for site in model.sites}, config=model.config)


@pytest.mark.parametrize("method", ["exact", "attribution", "attribution-ig"])
@pytest.mark.parametrize("backend", [bridged, traced])
def test_any_instrumented_model_has_the_same_scores(
    backend: Callable[[Transformer], Instrumented], method: str
) -> None:
    model, batch = transformer().float(), pairs()
    sites = "embed,z,resid_mid,mlp_out,L1.post.n3"
    ours, theirs = (
        score_nodes(which, batch, sites=sites, method=method)  # pyright: ignore[reportArgumentType]
        for which in (model, backend(model))
    )
    assert ours.sites == theirs.sites
    torch.testing.assert_close(theirs.examples, ours.examples, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_node_is_all_its_edges(ablation: Ablation, padded: bool) -> None:
    model, batch = transformer(**({"pad_token": 6} if padded else {})), pairs(padded=padded)
    found = score_nodes(model, batch, sites="z,mlp_out", ablation=ablation)
    paths = path_patch(model, batch, senders="a?.h?,m?", receivers="*", ablation=ablation, direction="noise")
    # The last MLP has but one reader.
    edges = paths.frame.query("receiver == 'together' or sender == 'm1'").set_index("sender")["effect"]
    names = [f"m{site.layer}" if site.head is None else f"a{site.layer}.h{site.head}" for site in found.sites]
    share = found.score / (found.clean - found.ablated)
    assert share.tolist() == pytest.approx(edges[names].tolist(), abs=1e-9)
    assert (found.clean, found.ablated) == pytest.approx((paths.clean, paths.corrupt))


def test_attribution_is_exact_where_the_model_is_linear_and_elsewhere_is_not() -> None:
    model, batch = transformer(normalization=None, d_mlp=0), pairs()
    exact, estimate = (score_nodes(model, batch, method=method) for method in ("exact", "attribution"))
    last = torch.tensor([site.layer == 1 for site in exact.sites])
    torch.testing.assert_close(estimate.examples[:, last], exact.examples[:, last], rtol=1e-9, atol=1e-9)
    assert float((estimate.score - exact.score)[~last].abs().max()) > 1e-2
    # One gradient at either run, the same on a straight line.
    other = score_nodes(model, batch, method="attribution", reference="corrupt")
    torch.testing.assert_close(other.examples[:, last], exact.examples[:, last], rtol=1e-9, atol=1e-9)
    assert float((estimate.score - other.score)[~last].abs().max()) > 1e-2


def test_attribution_is_transformer_lens_own() -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=6, vocab_size=11, attn_implementation="eager")  # pyright: ignore[reportCallIssue]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = GPT2LMHeadModel(config).eval()
        for parameter in module.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter)
    bridge = build_bridge_from_module(module, "GPT2LMHeadModel", hf_config=config)
    tokens, corrupt = torch.randint(0, 11, (2, 4, 6), generator=generator(0, "prompts"))
    read = torch.zeros(4, 6, dtype=torch.bool)
    read[:, 5] = True
    # Their metric sees one example's logits and nothing else, so all have the same answer.
    answer = torch.full_like(tokens, 3)
    batch = Batch(tokens=tokens, targets=answer, read=read, corrupt=corrupt, distractor=answer + 4)
    theirs = attribution_patch(bridge, tokens, corrupt, lambda logits: logits[0, 5, 3] - logits[0, 5, 7]).node_scores
    ours = score_nodes(BridgeModel(bridge), batch, sites="embed,z,mlp_out", method="attribution", reference="corrupt")
    kinds = {"embed": "embed", "z": "attn_head_out", "mlp_out": "mlp_out"}
    summed = [
        sum(score for node, score in theirs.items() if (node.kind, node.layer, node.head) == key)
        for key in ((kinds[site.kind.name], site.layer, site.head) for site in ours.sites)
    ]
    assert ours.score.tolist() == pytest.approx(summed, rel=1e-4, abs=1e-4)
    assert max(map(abs, summed)) > 0.1
    at_clean = score_nodes(BridgeModel(bridge), batch, sites="embed,z,mlp_out", method="attribution")
    assert at_clean.score.tolist() != pytest.approx(summed, abs=1e-2)


def test_metrics_against_the_clean_run_are_attributed_at_the_corrupt_one() -> None:
    model, batch = transformer(), pairs()
    exact = score_nodes(model, batch, metric="kl")
    assert exact.clean == pytest.approx(0, abs=1e-9)
    # Ablating raises the distance, so what carries the answer scores below zero.
    assert float(exact.score[0]) < 0
    assert exact.terms.better == "lower"
    estimate = score_nodes(model, batch, metric="kl", method="attribution", reference="corrupt")
    assert bool(estimate.score.isfinite().all())
    assert float(estimate.score.abs().max()) > 1e-3


def test_what_is_shown() -> None:
    model, batch = transformer(), pairs()
    found = score_nodes(model, batch)
    assert " ".join(map(str, found.sites)) == "embed pos_embed L0.z.h0 L0.z.h1 L0.mlp_out L1.z.h0 L1.z.h1 L1.mlp_out"
    assert ((found.low <= found.score) & (found.score <= found.high)).all()
    torch.testing.assert_close(found.examples.mean(0), found.score)
    # Positions are the same in both runs.
    assert float(found.score[1]) == pytest.approx(0, abs=1e-12)
    [table] = found.tables()
    assert table.name == "node_scores_exact"
    assert table.frame["score"].abs().is_monotonic_decreasing
    assert "n = 5 examples" in table.caption
    summary = found.summary()
    assert isinstance(summary["nodes"], list)
    assert summary["nodes"][2]["node"] == "L0.z.h0"
    assert (summary["method"], summary["ablation"], summary["reference"]) == ("exact", "resample", "clean")
    assert found.terms.n == 5
    assert found.provenance == model.provenance
    assert score_nodes(model, batch, seed=1).low.tolist() != found.low.tolist()


def test_without_counterfactuals_there_are_mean_and_zero() -> None:
    model, batch = transformer(), replace(pairs(), corrupt=None, distractor=None)
    assert score_nodes(model, batch, metric="loss", ablation="zero").terms.n == 5
    with pytest.raises(WorkbenchError, match="no counterfactual pairs"):
        score_nodes(model, batch, metric="loss")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"metric": "accuracy", "method": "attribution"}, "'accuracy' has no gradient: it counts top tokens"),
        ({"metric": "disagreement", "method": "attribution", "reference": "corrupt"}, "'disagreement' has no gradient"),
        ({"metric": "kl", "method": "attribution"}, "compares with the clean run.*Say reference='corrupt'"),
        ({"method": "attribution-ig", "reference": "clean"}, "leave reference='clean' out"),
        ({"method": "attribution-ig", "points": 0}, "A path needs at least 1 point, got 0"),
        ({"method": "attribution-ig", "metric": "accuracy"}, "'accuracy' has no gradient: it counts top tokens"),
        ({"ablation": "mean", "reference": "corrupt"}, "other end of resample ablation, not of mean"),
        ({"metric": "acuracy"}, "Did you mean 'accuracy'"),
        ({"sites": "L7.z"}, "Site L7.z is not in this model"),
        ({"sites": "L0.k.h9", "method": "attribution"}, "heads 0 to 1"),
        ({"sites": ""}, "No sites given"),
    ],
)
def test_what_cannot_be_scored_is_refused(asked: dict[str, object], message: str) -> None:
    model, batch = transformer(), pairs()
    # Right answers, so that even accuracy has headroom.
    batch = replace(batch, targets=model.forward(batch.tokens).argmax(-1))
    with pytest.raises(WorkbenchError, match=message):
        score_nodes(model, batch, **asked)  # pyright: ignore[reportArgumentType]


def test_batches_that_cannot_be_scored_are_refused() -> None:
    model, batch = transformer(pad_token=6), pairs(padded=True)
    with pytest.raises(WorkbenchError, match="No headroom: mean logit_difference is .* on the clean run"):
        score_nodes(model, replace(batch, corrupt=batch.tokens))
    with pytest.raises(WorkbenchError, match="Some pairs differ in length"):
        score_nodes(model, replace(batch, corrupt=batch.tokens.flip(0)))
    with pytest.raises(WorkbenchError, match="at least one example"):
        score_nodes(model, batch.select(slice(0, 0)))


def test_models_and_scores_that_cannot_be_are_refused() -> None:
    model = transformer()

    class Streams(Squares):
        sites = (Site(kind=SiteKind.resid_pre, layer=0),)

    with pytest.raises(WorkbenchError, match="names none of the sites embed, pos_embed, z, mlp_out"):
        score_nodes(Streams(), one_token(0))
    late = Renamed(Site(kind=SiteKind.resid_pre, layer=1))
    with pytest.raises(WorkbenchError, match="neither its embeddings nor the stream into its first layer"):
        score_nodes(late, one_token(0), sites="resid_pre", method="attribution-ig")
    found = score_nodes(model, pairs())
    with pytest.raises(WorkbenchError, match="1 scores of method 'exact' are not finite, such as that of L0.z.h0"):
        replace(found, examples=found.examples.index_fill(1, torch.tensor([2]), torch.nan))
    with pytest.raises(WorkbenchError, match=r"Scores of shape \[8\] came for 3 nodes"):
        replace(found, sites=found.sites[:3])


@pytest.mark.parametrize("field", ["method", "ablation", "reference"])
def test_options_that_there_are_not(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As outside the tests, where no shape or type is checked.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(WorkbenchError, match=f"Unknown {field} 'other'. Known"):
        score_nodes(transformer(), pairs(), **{field: "other"})  # pyright: ignore[reportArgumentType]
