import itertools

import pytest
import torch
from plain_edges import plain_edges, plain_filling, plain_run

from circuits.patching import patch_each
from workbench.models.high_level import ANSWER_OF, BRIDGE_OF, trained
from workbench.models.planted import (
    COPY_TOKENS,
    FREQUENCIES,
    MODULUS,
    NEURONS,
    PLANTED,
    SHARP,
    WIRED,
    and_gate,
    copy,
    frequency_clusters,
    induction,
    modular_addition,
    or_gate,
)
from workbench.runtime import WorkbenchError

N = 60


@pytest.fixture(scope="module", params=list(PLANTED))
def known(request):
    return PLANTED[request.param]()


def right(logits, batch):
    """Prompts all of whose answers are right."""
    return ((logits.argmax(-1) == batch.targets) | ~batch.read).all(1)


def outside(known, ablation):
    """All edges that the truth does not name."""
    constants = known.constants if ablation == "zero" else set()
    return set(plain_edges(known.model.config)) - known.structural - constants


def failures(known, cut, *, seed=0):
    """By ablation, how many prompts are answered wrong when these edges are cut."""
    batch, found = known.pairs(N, seed), {}
    with torch.no_grad():
        for ablation in known.ablations:
            logits, _ = plain_run(known.model, batch.tokens, cut, plain_filling(known.model, batch, ablation))
            found[ablation] = int((~right(logits, batch)).sum())
    return found


def domain(name):
    """Every prompt of a model's small world with its answers at the places that are read, by plain Python."""
    bits = [[*prompt, 2] for prompt in itertools.product((0, 1), repeat=4)]
    if name == "copy":
        prompts = list(itertools.product(range(COPY_TOKENS), repeat=4))
        return prompts, [prompt[:3] for prompt in prompts], slice(1, None)
    if name == "induction":
        words = list(itertools.product(itertools.permutations(range(8), 4), range(3)))
        return [(8, *four, four[i]) for four, i in words], [(four[i + 1],) for four, i in words], slice(-1, None)
    if name == "modular_addition":
        pairs = list(itertools.product(range(MODULUS), repeat=2))
        return [(a, b, MODULUS) for a, b in pairs], [((a + b) % MODULUS,) for a, b in pairs], slice(-1, None)
    if name == "trained_two_hop":
        prompts = list(itertools.product(range(8), range(8), (8, 9)))
        return prompts, [(ANSWER_OF[r - 8][BRIDGE_OF[e]],) for e, _, r in prompts], slice(-1, None)
    of = {
        "and_gate": lambda b: b[1] & b[3],
        "or_gate": lambda b: b[1] | b[3],
        "trained_xor": lambda b: b[0] ^ b[2],
    }[name]
    return bits, [(of(prompt),) for prompt in bits], slice(-1, None)


def test_every_answer_of_the_domain_is_right(known):
    prompts, answers, read = domain(known.name)
    logits = known.model(torch.tensor(prompts))[:, read]
    assert logits.argmax(-1).tolist() == [list(answer) for answer in answers]


def test_reference_is_the_model(known):
    batch = known.pairs(20, 0)
    logits, written = plain_run(known.model, batch.tokens)
    torch.testing.assert_close(logits, known.model(batch.tokens), rtol=1e-4, atol=1e-4)
    nothing, _ = plain_run(known.model, batch.tokens, plain_edges(known.model.config), written)
    torch.testing.assert_close(nothing, logits)


def test_pairs_have_headroom(known):
    batch = known.pairs(N, 3)
    assert len(batch) == N
    assert (batch.targets != batch.distractor)[batch.read].all()
    assert right(known.model(batch.tokens), batch).all()
    answers = known.model(batch.corrupt).argmax(-1)
    assert torch.equal(answers[batch.read], batch.distractor[batch.read])


def test_pairs_repeat_by_seed(known):
    first, again, other = (known.pairs(N, seed) for seed in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.corrupt, again.corrupt)
    assert not torch.equal(first.tokens, other.tokens)


def test_truth_names_edges_of_the_model(known):
    assert known.structural | known.constants <= set(plain_edges(known.model.config))


def test_truth_suffices(known):
    for ablation in known.ablations:
        assert failures(known, outside(known, ablation))[ablation] == 0, ablation


def test_every_edge_of_the_truth_is_needed(known):
    alone = {edge: failures(known, {edge}) for edge in sorted(known.structural)}
    for edge, wrong in alone.items():
        if any(wrong.values()):
            continue
        # Harmless alone: then it is one of two that stand in for each other, as the ways of an OR do.
        partners = [other for other in alone if other != edge and not all(alone[other].values())]
        joint = {other: failures(known, {edge, other}) for other in partners}
        assert any(
            joint[other][ablation] > alone[other][ablation] == 0 for other in partners for ablation in known.ablations
        ), edge


def test_only_the_or_gate_is_redundant():
    harmless = {
        name: sorted(e for e in known.structural if not any(failures(known, {e}).values()))
        for name, known in ((name, build()) for name, build in PLANTED.items())
    }
    assert {name for name, edges in harmless.items() if edges} == {"or_gate"}
    assert "m0->logits" not in harmless["or_gate"]
    assert len(harmless["or_gate"]) == 6


def test_positions_are_felt_by_zero_ablation_alone(known):
    edges = {edge for edge in known.structural | known.constants if edge.startswith("pos->")}
    assert edges
    assert not any(wrong for ablation, wrong in failures(known, edges).items() if ablation != "zero")


def test_constants_are_needed_where_they_are_named():
    for known in (and_gate(), modular_addition()):
        for edge in known.constants:
            assert failures(known, {edge})["zero"], edge


@pytest.mark.parametrize("name", WIRED)
def test_distractors_are_busy_and_unread(name):
    known = WIRED[name]()
    batch = known.pairs(N, 0)
    logits, written = plain_run(known.model, batch.tokens)
    in_truth = {edge.split("->")[0] for edge in known.structural}
    others = {writer: tensor for writer, tensor in written.items() if writer not in in_truth}
    busy = {writer for writer, tensor in others.items() if writer != "pos" and tensor.std(0).max() > 0.1}
    assert busy >= {"copy": {"a0.h0"}, "induction": {"a0.h0", "a1.h1"}, "modular_addition": {"a0.h0"}}.get(
        name, {"a0.h1"}
    )
    for ablation in known.ablations:
        cut = outside(known, ablation)
        after, _ = plain_run(known.model, batch.tokens, cut, plain_filling(known.model, batch, ablation))
        torch.testing.assert_close(after, logits, rtol=0, atol=1e-3)


def test_a_distractor_that_is_read_breaks_the_truth():
    known = copy()
    known.model.weights[0].attn.W_O.data[0, :, -10:] = 3 * torch.eye(6, 10)
    assert any(failures(known, outside(known, "resample")).values())


def test_an_edge_too_many_is_not_needed():
    known = induction()
    assert not any(failures(known, {"a0.h0->a1.h0<k>"}).values())


def test_wired_heads_look_where_they_should():
    known = copy()
    logits = known.model(known.pairs(8, 0).tokens)
    # One token's logit is GAIN, all others together get what attention leaks: at most three places of exp(-SHARP).
    assert (logits[:, 1:].amax(-1) - 10).abs().max() < 1e-5
    assert logits[:, 1:].sort(-1).values[..., :-1].abs().max() <= 10 * 3 * torch.e**-SHARP + 1e-6


def test_denoising_and_noising_disagree_in_the_gates():
    for build, denoised, noised in ((or_gate, 1.0, 0.0), (and_gate, 0.0, 1.0)):
        known = build()
        found = patch_each(known.model, known.pairs(N, 0), sites="L0.z", direction="both")
        for index, cell in enumerate(found.cells):
            wired = cell.position == 4 and cell.site.head in (0, 2)
            assert bool(found.disagree[index]) == wired
            wanted = (denoised, noised) if wired else (0.0, 0.0)
            assert found.effect[:, index].tolist() == pytest.approx(wanted, abs=1e-5)


def test_sums_of_angles_are_multiplied_out():
    model = modular_addition().model
    a, b = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS)).T
    _, written = plain_run(model, torch.stack([a, b, torch.full_like(a, MODULUS)], 1))
    directions = model.unembed.W_U.abs().sum(1).nonzero()[:, 0]
    found = written["m0"][:, -1, directions]
    for index, frequency in enumerate(FREQUENCIES):
        angle = 2 * torch.pi * frequency * (a + b) / MODULUS
        wanted = torch.stack([angle.cos(), angle.sin()], 1)
        assert (found[:, 2 * index : 2 * index + 2] - wanted).abs().max() < 0.02


def test_clusters_carry_one_frequency_each():
    model, clusters = modular_addition().model, frequency_clusters()
    assert sorted(neuron for cluster in clusters for neuron in cluster) == list(range(model.config.d_mlp))
    assert [len(cluster) for cluster in clusters] == [NEURONS, NEURONS, NEURONS, 4]
    directions = model.unembed.W_U.abs().sum(1).nonzero()[:, 0]
    W_out = model.weights[0].mlp.W_out[:, directions]
    for index, cluster in enumerate(clusters):
        written = set(W_out[list(cluster)].abs().sum(0).nonzero()[:, 0].tolist())
        assert written == ({2 * index, 2 * index + 1} if index < 3 else set())


def test_unknown_trained_model():
    with pytest.raises(WorkbenchError, match="No trained model holds a program 'xro'. Did you mean 'xor'"):
        trained("xro")
