"""The reference for edges: a forward pass written out reader by reader, without hooks, for models without LayerNorm."""

import torch


def plain_edges(config):
    """Every edge of a model: all earlier writers into each head's q, k and v, each MLP, and the logits."""
    writers, edges = ["embed", "pos"], []
    for step in range(config.n_steps):
        heads = [f"a{step}.h{head}" for head in range(config.n_heads)]
        edges += [f"{writer}->{head}<{part}>" for head in heads for part in "qkv" for writer in writers]
        writers += heads
        if config.d_mlp:
            edges += [f"{writer}->m{step}" for writer in writers]
            writers.append(f"m{step}")
    return [*edges, *(f"{writer}->logits" for writer in writers)]


def plain_run(model, tokens, cut=(), other=None):
    """Logits and contributions by writer; what a cut edge carries is taken from `other`."""
    assert model.config.normalization is None
    assert "attn" not in model.config.biases
    length = tokens.shape[1]
    written = {
        "embed": model.embed.W_E[tokens],
        "pos": model.pos_embed.W_pos[:length].expand(len(tokens), length, -1),
    }

    def reads(reader):
        return sum(other[w] if f"{w}->{reader}" in cut else own for w, own in written.items())

    later = torch.ones(length, length).triu(1).bool()
    for step in range(model.config.n_steps):
        attn, mlp = model.block(step).attn, model.block(step).mlp
        outputs = {}
        for h in range(model.config.n_heads):
            name = f"a{step}.h{h}"
            q = reads(f"{name}<q>") @ attn.W_Q[h]
            k = reads(f"{name}<k>") @ attn.W_K[h]
            v = reads(f"{name}<v>") @ attn.W_V[h]
            scores = q @ k.mT / model.config.d_head**0.5
            outputs[name] = scores.masked_fill(later, -torch.inf).softmax(-1) @ v @ attn.W_O[h]
        written |= outputs
        if mlp is not None:
            written[f"m{step}"] = torch.relu(reads(f"m{step}") @ mlp.W_in + mlp.b_in) @ mlp.W_out + mlp.b_out
    logits = reads("logits") @ model.unembed.W_U
    return logits if model.unembed.b_U is None else logits + model.unembed.b_U, written


def plain_filling(model, batch, ablation):
    """What a cut edge carries, by writer: the counterfactual's, the batch's mean at each position, or zero."""
    _, written = plain_run(model, batch.corrupt if ablation == "resample" else batch.tokens)
    if ablation == "mean":
        return {name: tensor.mean(0, keepdim=True).expand_as(tensor) for name, tensor in written.items()}
    return written if ablation == "resample" else {name: torch.zeros_like(tensor) for name, tensor in written.items()}
