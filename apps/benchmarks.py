"""What is measured: training steps, sweeps and circuits against a named peer, or the plain way to the same numbers.

A benchmark is one function that returns a `Benchmark`, and an entry in `BENCHMARKS`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from apps.bench import REPEATS, Benchmark, BenchmarkResult, Run, measure
from apps.races import RACES, RaceResult, run_race
from apps.run_benchmarks import RUNS
from apps.step_benchmarks import STEPS
from circuits.acdc import acdc
from circuits.attention_effects import CleanPass, score
from circuits.attention_ops import EditedPass
from circuits.attribution import POINTS, eap, eap_ig
from circuits.components import everything, inputs_of, run_parts, weighted
from circuits.curve import MIB_SHARES
from circuits.discovery import top_n
from circuits.experiment import Experiment, experiment
from circuits.graph import CircuitGraph, circuit_graph
from circuits.memoised import circuit_values
from circuits.patching import patch_each
from circuits.search_prompts import SearchPrompt
from workbench.instrument.sites import Site, SiteKind
from workbench.models.bridges import to_bridge
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator, nearest
from workbench.tasks.base import Batch
from workbench.tasks.graph_search import GraphSearch

PAIRS = 64


def run_benchmark(name: str, *, repeats: int = REPEATS, seed: int = 0) -> BenchmarkResult | RaceResult:
    """Measure the benchmark called `name`; a round of a race is a seed.

    Raises:
        WorkbenchError: there is none of that name, or fewer than one round is asked for.
    """
    if name in RACES:
        return run_race(RACES[name](), seeds=repeats)
    if name not in BENCHMARKS:
        raise WorkbenchError(f"Unknown benchmark {name!r}. {nearest(name, [*BENCHMARKS, *RACES])}")
    return measure(BENCHMARKS[name](), repeats=repeats, seed=seed)


def _patching(name: str, config: ModelConfig, *, pairs: int, target: float) -> Benchmark:
    """Denoising every layer and position of `resid_pre`, against TransformerLens' own loop.

    Theirs is the loop alone: the clean run's cache is given to it, gradients are off. Ours is all of `patch_each`: both
    runs, the sweep, the intervals. Clean and corrupt prompts share their first third, as prompts with one thing changed
    do.
    """
    return Benchmark(
        name=name,
        compares="Denoising the residual stream at every layer and position, logit difference at the last position.",
        peer="transformer_lens.patching.get_act_patch_resid_pre",
        prepare=partial(_prepare_patching, config, pairs),
        agreement=_largest_difference,
        target=target,
        gate=0.85 * target,
        conditions={
            **{name: getattr(config, name) for name in ("n_layers", "d_model", "n_heads", "d_mlp", "d_vocab")},
            "positions": config.n_ctx,
            "shared_positions": config.n_ctx // 3,
            "pairs": pairs,
        },
    )


def _prepare_patching(config: ModelConfig, pairs: int) -> tuple[Run, Run]:
    model, batch = _random_model(config), _random_pairs(config, pairs)
    bridge, _ = to_bridge(model)
    # By name: TransformerLens is the rival here, and nothing that an analysis may build on.
    patching = importlib.import_module("transformer_lens.patching")
    corrupt, distractors = batch.pairs()
    rows, answer, distractor = torch.arange(pairs), batch.targets[:, -1], distractors[:, -1]

    def logit_difference(logits: Tensor) -> Tensor:
        return (logits[rows, -1, answer] - logits[rows, -1, distractor]).mean()

    with torch.no_grad():
        logits, cache = bridge.run_with_cache(batch.tokens)
    scale = logits.abs().max()

    def theirs() -> Tensor:
        # A progress bar is drawn on standard error.
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            return patching.get_act_patch_resid_pre(bridge, corrupt, cache, logit_difference).flatten() / scale

    def ours() -> Tensor:
        return patch_each(model, batch, sites="resid_pre", direction="denoise").patched[0] / scale

    return theirs, ours


def _random_pairs(config: ModelConfig, pairs: int) -> Batch:
    """Random prompts and counterfactuals that share their first third."""
    rng = generator(0, "benchmark", "pairs")
    tokens, corrupt, answer = (torch.randint(0, config.d_vocab, (pairs, config.n_ctx), generator=rng) for _ in range(3))
    shared = config.n_ctx // 3
    corrupt[:, :shared] = tokens[:, :shared]
    read = torch.zeros_like(tokens, dtype=torch.bool)
    read[:, -1] = True
    return Batch(tokens=tokens, targets=answer, read=read, corrupt=corrupt, distractor=(answer + 1) % config.d_vocab)


def _largest_difference(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs - ours).abs().max())


def _toy_patching(pairs: int, target: float) -> Benchmark:
    config = ModelConfig(
        n_layers=4, d_model=256, n_heads=4, d_head=64, d_mlp=1024, n_ctx=6, d_vocab=2200, d_vocab_out=2200,
        normalization="LN", activation="gelu", biases=("attn", "mlp", "unembed"),
    )  # fmt: skip
    return _patching(f"patch-toy-{pairs}", config, pairs=pairs, target=target)


def _gpt2_patching() -> Benchmark:
    config = ModelConfig(
        n_layers=12, d_model=768, n_heads=12, d_head=64, d_mlp=3072, n_ctx=16, d_vocab=50257, d_vocab_out=50257,
        normalization="LN", activation="gelu_new", biases=("attn", "mlp", "unembed"),
    )  # fmt: skip
    return _patching("patch-gpt2", config, pairs=4, target=15.0)


def _eap_ig(name: str, config: ModelConfig) -> Benchmark:
    return Benchmark(
        name=name,
        compares=f"EAP-IG on the inputs with {POINTS} points, logit difference, both runs included.",
        peer="one forward and backward pass a point, as published, on the model in parts",
        prepare=partial(_prepare_eap_ig, config),
        agreement=_largest_difference,
        target=2.0,
        gate=2.0,
        conditions=_shape(config),
    )


def _prepare_eap_ig(config: ModelConfig) -> tuple[Run, Run]:
    model, batch = _random_model(config), _random_pairs(config, PAIRS)

    def ours() -> Tensor:
        return _scaled(eap_ig(experiment(model, batch)).score)

    return (lambda: _scaled(_plain_eap_ig(model, batch))), ours


def _plain_eap_ig(model: Transformer, batch: Batch) -> Tensor:
    """The loop over points: each backward pass meets every port, and its score is added there."""
    graph = circuit_graph(model)
    corrupt, distractors = batch.pairs()
    with torch.no_grad():
        inputs = [inputs_of(model, graph, tokens) for tokens in (batch.tokens, corrupt)]
        clean = run_parts(model, graph, batch.tokens, inputs[0], everything)[0]
        ablated = run_parts(model, graph, corrupt, inputs[1], everything)[0]
    difference, scores = clean - ablated, torch.zeros(len(graph.edges))
    answer, distractor = batch.targets[batch.read][:, None], distractors[batch.read][:, None]
    for point in range(POINTS):
        probes: list[tuple[slice, Tensor]] = []
        at = inputs[1] + point / POINTS * (inputs[0] - inputs[1])
        stream = run_parts(model, graph, batch.tokens, at, partial(_probed, probes))[1]
        logits = model.finish(stream[batch.read], {})
        value = (logits.gather(1, answer) - logits.gather(1, distractor)).mean()
        gradients = torch.autograd.grad(value, [probe for _, probe in probes])
        for (ports, _), gradient in zip(probes, gradients, strict=True):
            n_writers, first = graph.ports[ports.start].n_writers, graph.first_edge[ports.start]
            some = torch.einsum("bpxd,bpwd->xw", gradient, difference[:, :, :n_writers]).flatten()
            scores[first : first + len(some)] += some / POINTS
    return scores


def _probed(probes: list[tuple[slice, Tensor]], ports: slice, outputs: Tensor) -> Tensor:
    """The whole model's mix, with a zero added at each port whose gradient is the port's."""
    x = everything(ports, outputs)
    probe = x.new_zeros(*x.shape[:2], ports.stop - ports.start, x.shape[3]).requires_grad_()
    probes.append((ports, probe))
    return x + probe


def _acdc(name: str, config: ModelConfig, *, shares: tuple[float, ...]) -> Benchmark:
    return Benchmark(
        name=name,
        compares="ACDC at thresholds of " + ", ".join(f"{share:.0%}" for share in shares) + " of the headroom.",
        peer="one forward pass of the model in parts for each edge and threshold",
        prepare=partial(_prepare_acdc, config, shares),
        agreement=_largest_difference,
        # The same edges, exactly.
        tolerance=0.0,
        target=10.0,
        gate=10.0,
        conditions={**_shape(config), "thresholds": list(shares)},
    )


def _prepare_acdc(config: ModelConfig, shares: tuple[float, ...]) -> tuple[Run, Run]:
    plan = experiment(_random_model(config), _random_pairs(config, PAIRS))
    thresholds = [share * abs(plan.headroom) for share in shares]

    def theirs() -> Tensor:
        return torch.stack([_plain_acdc(plan, threshold) for threshold in thresholds]).float()

    def ours() -> Tensor:
        return torch.stack([acdc(plan, threshold).keep for threshold in thresholds]).float()

    return theirs, ours


def _plain_acdc(plan: Experiment, threshold: float) -> Tensor:
    """The loop over edges, from the logits backwards."""
    keep, value = torch.ones(len(plan.graph.edges), dtype=torch.bool), float(plan.full.mean())
    for port in reversed(range(len(plan.graph.ports))):
        edges = plan.graph.of_port(port)
        for edge in reversed(range(edges.start, edges.stop)):
            keep[edge] = False
            without = float(_one_circuit(plan, keep).mean())
            if value - without < threshold:
                value = without
            else:
                keep[edge] = True
    return keep


def _one_circuit(plan: Experiment, keep: Tensor) -> Tensor:
    """The metric of one circuit by one forward pass in parts."""
    with torch.no_grad():
        inputs = inputs_of(plan.model, plan.graph, plan.batch.tokens)
        mix = weighted(plan.graph, keep[None].to(inputs), plan.ablated)
        stream = run_parts(plan.model, plan.graph, plan.batch.tokens, inputs, mix)[1]
        return plan.measure(plan.model.finish(stream[plan.batch.read], {}))


def _curve(name: str, config: ModelConfig) -> Benchmark:
    return Benchmark(
        name=name,
        compares=f"The metric of the best edges at {len(MIB_SHARES)} sizes.",
        peer="each size evaluated by itself: the counterfactual run, then the circuit in parts",
        prepare=partial(_prepare_curve, config),
        agreement=_largest_difference,
        target=3.0,
        gate=3.0,
        conditions=_shape(config),
    )


def _prepare_curve(config: ModelConfig) -> tuple[Run, Run]:
    model, batch = _random_model(config), _random_pairs(config, PAIRS)
    first = experiment(model, batch)
    scores, graph = eap(first), first.graph
    sizes = [max(1, round(share * len(graph.edges))) for share in MIB_SHARES]
    keep = torch.stack([top_n(scores, size).keep for size in sizes])

    def theirs() -> Tensor:
        return _scaled(torch.stack([_evaluated_alone(first, graph, mask) for mask in keep]))

    def ours() -> Tensor:
        return _scaled(circuit_values(experiment(model, batch), keep))

    return theirs, ours


def _evaluated_alone(plan: Experiment, graph: CircuitGraph, keep: Tensor) -> Tensor:
    corrupt, _ = plan.batch.pairs()
    with torch.no_grad():
        run_parts(plan.model, graph, corrupt, inputs_of(plan.model, graph, corrupt), everything)
    return _one_circuit(plan, keep)


def _attention_effects(name: str, config: ModelConfig) -> Benchmark:
    return Benchmark(
        name=name,
        compares="What zeroing and raising each entry of every attention pattern of one search prompt does.",
        peer="one forward pass an edit",
        prepare=partial(_prepare_attention_effects, config),
        agreement=_largest_difference,
        tolerance=1e-4,
        target=20.0,
        gate=20.0,
        conditions={name: value for name, value in _shape(config).items() if name not in ("shared_positions", "pairs")},
    )


def _prepare_attention_effects(config: ModelConfig) -> tuple[Run, Run]:
    task = GraphSearch(size=config.n_ctx)
    chain = [(vertex, vertex + 1) for vertex in range(1, task.layout.n_edges + 1)]
    prompt = SearchPrompt.read(task.ask(chain, 1, task.layout.n_names).tokens[0], task.layout)
    clean = CleanPass.of(_random_model(config), prompt)

    def ours() -> Tensor:
        effects = EditedPass.of(clean, "margin").effects
        return torch.stack([_flat(each.measure, each.key_score, each.query_score) for each in effects])

    return (lambda: _plain_attention_effects(clean)), ours


def _plain_attention_effects(clean: CleanPass) -> Tensor:
    """The loop over edits: each is made in a pass of its own, which keeps the last layer's queries and keys."""
    model, last = clean.model, clean.last
    best, rival = clean.logits.topk(2).indices.tolist()
    kept: dict[str, Tensor] = {}
    watched = {Site(kind=SiteKind[slot], layer=last): partial(kept.setdefault, slot) for slot in ("q", "k")}
    layers = []
    for layer, pattern in enumerate(clean.pattern):
        raised, found = pattern.amax(0).expand_as(pattern), []
        for value, dest, src in _each_entry(torch.stack([torch.zeros_like(pattern), raised])):
            kept.clear()
            edit = {Site(kind=SiteKind.pattern, layer=layer): partial(_set_entry, dest, src, value)}
            with torch.no_grad():
                logits = model.forward(clean.prompt.padded[None], {**watched, **edit})[0, -1]
            q, k = (kept[slot][0, :, 0] for slot in ("q", "k"))
            scores = (score(clean.q[last][-1:], k)[0], score(q[-1:], clean.k[last])[0])
            found.append((logits[best] - logits[rival], *scores))
        layers.append(_flat(*(torch.stack(kind) for kind in zip(*found, strict=True))))
    return torch.stack(layers)


def _each_entry(values: Tensor) -> Iterator[tuple[float, int, int]]:
    for edited in values.tolist():
        for dest, row in enumerate(edited):
            for src, value in enumerate(row):
                yield value, dest, src


def _set_entry(dest: int, src: int, value: float, pattern: Tensor) -> Tensor:
    pattern = pattern.clone()
    pattern[0, 0, dest, src] = value
    return pattern


def _flat(*tensors: Tensor) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _random_model(config: ModelConfig) -> Transformer:
    return Transformer(config, generator=generator(0, "benchmark", "weights")).eval()


def _scaled(values: Tensor) -> Tensor:
    return values / values.abs().max()


def _shape(config: ModelConfig) -> dict[str, object]:
    fields = ("n_layers", "d_model", "n_heads", "d_mlp", "d_vocab")
    return {
        **{name: getattr(config, name) for name in fields},
        "positions": config.n_ctx,
        "shared_positions": config.n_ctx // 3,
        "pairs": PAIRS,
    }


ONE_LAYER = ModelConfig(
    n_layers=1, d_model=128, n_heads=4, d_head=32, d_mlp=512, n_ctx=3, d_vocab=114, d_vocab_out=114, activation="relu",
)  # fmt: skip
FOUR_LAYERS = ModelConfig(
    n_layers=4, d_model=64, n_heads=4, d_head=16, d_mlp=256, n_ctx=10, d_vocab=100, d_vocab_out=100,
    normalization="LN", activation="gelu", biases=("attn", "mlp", "unembed"),
)  # fmt: skip
SEARCH = ModelConfig(
    n_layers=4, d_model=63, n_heads=1, d_head=63, d_mlp=63, n_ctx=32, d_vocab=15, d_vocab_out=15, normalization="LN",
    embedding="one_hot", tied=True, biases=("attn", "mlp"), causal=False, pad_token=13,
)  # fmt: skip
BENCHMARKS: Mapping[str, Callable[[], Benchmark]] = {
    **STEPS,
    **RUNS,
    "patch-toy-1": partial(_toy_patching, 1, 12.1),
    "patch-toy-32": partial(_toy_patching, 32, 4.5),
    "patch-gpt2": _gpt2_patching,
    "eap-ig-1-layer": partial(_eap_ig, "eap-ig-1-layer", ONE_LAYER),
    "eap-ig-4-layers": partial(_eap_ig, "eap-ig-4-layers", FOUR_LAYERS),
    "acdc": partial(_acdc, "acdc", FOUR_LAYERS, shares=(0.03, 0.1, 0.3)),
    "curve": partial(_curve, "curve", FOUR_LAYERS),
    "attention-effects": partial(_attention_effects, "attention-effects", SEARCH),
}
"""What can be measured in rounds, by name."""
ALL = (*BENCHMARKS, *RACES)
"""All names."""
