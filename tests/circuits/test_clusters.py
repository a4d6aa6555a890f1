"""What clusters of neurons carry, on a model where every share is known."""

from __future__ import annotations

import pytest
import torch

from circuits.clusters import cluster_shares
from circuits.experiment import experiment
from circuits.graph import circuit_graph
from circuits.memoised import circuit_values
from tests.circuits.test_faithfulness import bootstrap_95, told_apart
from tests.circuits.test_memoised import planned
from workbench.models.planted import frequency_clusters, modular_addition
from workbench.runtime import WorkbenchError


def test_clusters_of_the_planted_frequencies_share_what_the_mlp_carries() -> None:
    known = modular_addition()
    clusters = frequency_clusters()
    graph = circuit_graph(known.model, clusters={0: clusters})
    plan = experiment(known.model, known.pairs(32, 0), graph=graph, metric="logit_difference")
    found = cluster_shares(plan, [f"frequency {place}" for place in range(len(clusters))])
    lost, restored = found.share
    # Each frequency adds its own part to the logits, so that what is lost without it is what it restores.
    torch.testing.assert_close(lost, restored, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(restored.sum(), torch.tensor(1.0), rtol=1e-3, atol=1e-3)
    assert (found.low <= found.share).all()
    assert (found.share <= found.high).all()
    assert found.neurons == tuple(map(len, clusters))
    assert set(found.frame["cluster"]) == {f"frequency {place}" for place in range(len(clusters))}
    assert found.tables()[0].frame.equals(found.frame)


def test_a_cluster_is_ablated_by_all_its_edges() -> None:
    """Beside the MLP this model has heads, and another MLP: without any cluster it is not the empty circuit."""
    plan = told_apart("clusters")
    found = cluster_shares(plan)
    assert found.names == ("m1.c0", "m1.c1")
    cut = torch.tensor([[edge.source == name for edge in plan.graph.edges] for name in found.names])
    nothing = circuit_values(plan, ~cut.any(0, keepdim=True))[0]
    assert abs(float((nothing - plan.empty).mean())) > 0.1 * abs(plan.headroom)
    for place, own in enumerate(cut):
        without, alone = circuit_values(plan, torch.stack([~own, ~(cut.any(0) & ~own)]))
        for way, share in enumerate((plan.full - without, alone - nothing)):
            torch.testing.assert_close(found.share[way, place], share.mean() / plan.headroom)
            low, high = bootstrap_95(share, plan.full - plan.empty)
            ends = [float(end[way, place]) for end in (found.low, found.high)]
            assert ends == pytest.approx([low, high], abs=0.1 * (high - low))


def test_a_graph_without_clusters_and_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(WorkbenchError, match="No MLP of this graph is split"):
        cluster_shares(planned("plain"))
    with pytest.raises(WorkbenchError, match="1 labels came for 2 clusters: m1.c0, m1.c1"):
        cluster_shares(planned("clusters"), ["one"])
