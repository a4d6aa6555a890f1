import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.instrument.sites import Instrumented, Site, SiteKind, check_site, select_sites
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError

numbers = st.tuples(st.sampled_from(list(SiteKind)), st.integers(0, 99), st.none() | st.integers(0, 9999))


def site_of(kind, layer, part):
    """The site that these numbers stand for, as far as its kind has layer, heads or neurons."""
    return Site(
        kind=kind,
        layer=layer if kind.layered else None,
        head=part if "head" in kind.dims else None,
        neuron=part if "d_mlp" in kind.dims else None,
    )


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        n_layers=2, d_model=8, n_heads=3, d_head=4, d_mlp=5, n_ctx=4, d_vocab=7, d_vocab_out=7, normalization="LN"
    )
    return Transformer(config, generator=None)


@given(numbers)
def test_text_and_back(number):
    site = site_of(*number)
    assert Site.parse(str(site)) == site


@given(numbers, numbers)
def test_order_is_total_and_by_layer_first(one, other):
    first, second = site_of(*one), site_of(*other)
    assert (first < second) + (second < first) + (first == second) == 1
    if first.layer is not None and second.layer is not None and first.layer < second.layer:
        assert first < second


def test_spelling_and_place():
    site = Site(kind=SiteKind.z, layer=0, head=3)
    assert str(site) == "L0.z.h3"
    assert site.place == "blocks.0.attn.hook_z"
    assert site.axis("head") == 2
    assert str(site.whole) == "L0.z"
    assert str(Site(kind=SiteKind.post, layer=1, neuron=17)) == "L1.post.n17"


def test_a_forward_pass_meets_the_sites_in_their_order(model):
    met = []
    handles = [
        model.get_submodule(site.place).register_forward_hook(
            lambda module, inputs, output, site=site: met.append(site)
        )
        for site in model.sites
    ]
    model(torch.zeros(1, 4, dtype=torch.long))
    for handle in handles:
        handle.remove()
    assert tuple(met) == model.sites


def test_transformer_is_instrumented(model):
    assert isinstance(model, Instrumented)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("L0.zz", "Unknown site 'L0.zz'"),
        ("L0.resid_prr", "Did you mean 'resid_pre'"),
        ("z", "'z' needs a layer"),
        ("L0.embed", "'embed' has no layer"),
        ("L0.resid_pre.h1", "'resid_pre' has no heads"),
        ("L0.z.n1", "'z' has no neurons"),
        ("", "Unknown site ''"),
    ],
)
def test_what_is_no_site_is_refused(text, message):
    with pytest.raises(WorkbenchError, match=message):
        Site.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("L2.z", "not in this model \\(2 layers\\)"),
        ("L0.z.h3", "heads 0 to 2"),
        ("L0.post.n5", "neurons 0 to 4"),
    ],
)
def test_sites_that_a_model_lacks_are_refused(model, text, message):
    with pytest.raises(WorkbenchError, match=message):
        check_site(Site.parse(text), model)


def test_selection_expands_kinds_heads_and_neurons(model):
    def selected(wanted):
        return [str(site) for site in select_sites(wanted, model)]

    assert selected("resid_pre, mlp_out") == ["L0.resid_pre", "L0.mlp_out", "L1.resid_pre", "L1.mlp_out"]
    assert selected("L1.z") == ["L1.z.h0", "L1.z.h1", "L1.z.h2"]
    assert selected(["z", Site.parse("embed")]) == ["embed", *(f"L{i}.z.h{h}" for i in range(2) for h in range(3))]
    assert selected("L0.post.n*") == [f"L0.post.n{n}" for n in range(5)]
    assert selected("L0.z.h1,L0.z.h1") == ["L0.z.h1"]


@pytest.mark.parametrize(("wanted", "message"), [("", "No sites given"), ("L0.q,bogus", "Unknown site 'bogus'")])
def test_bad_selections(model, wanted, message):
    with pytest.raises(WorkbenchError, match=message):
        select_sites(wanted, model)
