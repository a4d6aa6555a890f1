"""Files of pairs: one meaning in many spellings, and faults named by their lines."""

import json

import pytest

from workbench.models.config import ModelConfig
from workbench.runtime import WorkbenchError
from workbench.tasks.pairs import Pairs
from workbench.training.pair_files import read_pairs

CONFIG = ModelConfig(n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=6, n_ctx=3, d_vocab=6, d_vocab_out=5)
PADDING = ModelConfig(
    n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=6, n_ctx=3, d_vocab=6, d_vocab_out=5, pad_token=5
)
HEADER = "clean,corrupt,answer,distractor\n"
WORDS = ("zero", "one", "two", "three", "four", "=")
WANTED = Pairs(
    vocab=tuple("012345"),
    clean=((0, 1, 5), (3, 1, 5)),
    corrupt=((0, 2, 5), (4, 1, 5)),
    answer=(1, 2),
    distractor=(2, 2),
    predictable=5,
)


def read(folder, content, *, name="pairs.csv", config=CONFIG, vocab=None):
    (folder / name).write_text(content, encoding="utf-8")
    return read_pairs(folder / name, config, vocab)


def lines(*rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.csv", HEADER + "0 1 5,0 2 5,1,2\n3 1 5,4 1 5,2,2\n"),
        ("no_last_line_end.csv", HEADER + "0 1 5,0 2 5,1,2\n3 1 5,4 1 5,2,2"),
        ("UPPER.CSV", HEADER + "0 1 5,0 2 5,1,2\n3 1 5,4 1 5,2,2\n"),
        # As a spreadsheet writes it: a mark at the start, quotes, other line ends, an empty line, a column of its own.
        (
            "sheet.csv",
            '\ufeffid, clean ,"corrupt",answer,distractor\r\na,"0 1 5", 0 2 5 ,1,2\r\n\r\nb,3  1 5,4 1 5,2,2\r\n',
        ),
        (
            "texts.jsonl",
            lines(
                {"clean": "0 1 5", "corrupt": "0 2 5", "answer": "1", "distractor": "2", "note": "\u2028"},
                {"clean": "3 1 5", "corrupt": "4 1 5", "answer": "2", "distractor": "2"},
            ),
        ),
        (
            "numbers.jsonl",
            "\n"
            + lines(
                {"clean": [0, 1, 5], "corrupt": [0, 2, 5], "answer": 1, "distractor": 2},
                {"clean": ["3", "1", "5"], "corrupt": [4, 1, 5], "answer": [2], "distractor": 2},
            ),
        ),
    ],
    ids=["plain", "no last line end", "upper", "sheet", "texts", "numbers"],
)
def test_one_meaning_in_many_spellings(tmp_path, name, content):
    assert read(tmp_path, content, name=name) == WANTED


def test_token_0_is_an_answer_like_any_other(tmp_path):
    row = {"clean": [0], "corrupt": [1], "answer": 0, "distractor": 1}
    assert read(tmp_path, lines(row), name="zero.jsonl").answer == (0,)


@pytest.mark.parametrize("end", ["\n", "", "\r\n"])
def test_words_of_a_vocabulary(tmp_path, end):
    vocab = tmp_path / "vocab.txt"
    vocab.write_bytes(((end or "\n").join(WORDS) + end).encode())
    pairs = read(tmp_path, HEADER + "zero one =,zero two =,one,two\n", vocab=vocab)
    assert pairs.vocab == WORDS
    assert pairs.clean == ((0, 1, 5),)
    with pytest.raises(WorkbenchError, match="line 2: Token '0' is outside the vocabulary of 6 tokens"):
        read(tmp_path, HEADER + "0 one =,zero two =,one,two\n", vocab=vocab)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: '' is not one token"),
        ("zero\none\n", "vocab.txt has 2 tokens, 2 of them different; the model has 6"),
        ("a\nb\nc\nd\na\ne\n", "has 6 tokens, 5 of them different"),
        ("a\nb\n\nd\ne\nf\n", "line 3: '' is not one token. Give one a line"),
        ("a\nb\nc d\nd\ne\nf\n", "line 3: 'c d' is not one token"),
    ],
)
def test_bad_vocabularies(tmp_path, content, message):
    vocab = tmp_path / "vocab.txt"
    vocab.write_text(content)
    with pytest.raises(WorkbenchError, match=message):
        read(tmp_path, HEADER + "0 1,0 2,1,2\n", vocab=vocab)


def test_prompts_of_several_lengths_need_a_padding_token(tmp_path):
    content = HEADER + "0 1,0 2,1,2\n0 1 2,0 1 3,1,2\n"
    with pytest.raises(WorkbenchError, match="line 3: prompts of 3 tokens after prompts of 2.*no padding token"):
        read(tmp_path, content)
    pairs = read(tmp_path, content, config=PADDING)
    assert pairs.pad_token == 5
    assert pairs.examples("test").tokens.tolist() == [[0, 1, 5], [0, 1, 2]]
    with pytest.raises(WorkbenchError, match=r"line 2: a prompt holds the padding token \(5\)"):
        read(tmp_path, HEADER + "0 5,0 2,1,2\n", config=PADDING)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no pairs. Each line needs clean, corrupt, answer, distractor"),
        (HEADER, "holds no pairs"),
        ("clean,corrupt,answer\n0,1,2\n", "lacks the column distractor. It needs clean,corrupt,answer,distractor"),
        ("0 1 5,0 2 5,1,2\n", "lacks the column clean, corrupt, answer, distractor"),
        ("clean;corrupt;answer;distractor\n0;1;2;3\n", "lacks the column clean, .* It needs clean,corrupt"),
        (HEADER + "0 1,0 2,1\n", "line 2: distractor is missing"),
        (HEADER + "0 1,,1,2\n", "line 2: corrupt is missing"),
        (HEADER + "0 1,0,1,2\n", "line 2: clean has 2 tokens and corrupt 1; they must align one to one"),
        (HEADER + "0 1,0 1,1,2\n", "line 2: clean and corrupt are the same prompt"),
        (HEADER + "0 9,0 1,1,2\n", "line 2: Token '9' is outside the vocabulary of 6 tokens"),
        (HEADER + "0 -1,0 1,1,2\n", "line 2: Token '-1' is outside"),
        (HEADER + "0 1,0 2,5,2\n", r"line 2: answer must be one token that the model predicts \(ids 0 to 4\)"),
        (HEADER + "0 1,0 2,1,5\n", "line 2: distractor must be one token that the model predicts"),
        (HEADER + "0 1,0 2,1 1,2\n", "answer must be one token"),
        (HEADER + "0 1 2 3,0 1 2 4,1,2\n", r"line 2: 4 tokens are more than the model reads \(3\)"),
        (HEADER + "0 1,0 2,1,2\n0 9,0 1,1,2\n\n0 8,0 1,1,2\n", "2 of 3 pairs .* line 3: .*'9'.* line 5: .*'8'"),
        (HEADER + "0 9,0 1,1,2\n" * 7, "7 of 7 pairs are faulty. line 2.*line 6: [^:]* And 2 more"),
        (HEADER + '"' + "0 1,0 2,1,2\n" * 12_000, "is not CSV: field larger than field limit"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    with pytest.raises(WorkbenchError, match=message):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n\n", "holds no pairs"),
        ('{"clean": "0"}\n{', "line 2 is not JSON"),
        ("[1, 2]\n", "line 1 is not a JSON object with clean, corrupt"),
        ('\n{"clean": "0 1", "corrupt": [], "answer": null, "distractor": 1}\n', "line 2: corrupt, answer is missing"),
        ('{"clean": "0 1", "corrupt": [0, 2.5], "answer": 1, "distractor": 1}\n', "Token '2.5' is outside"),
        ('{"clean": "0 1", "corrupt": {"a": 1}, "answer": 1, "distractor": 1}\n', "outside the vocabulary"),
    ],
)
def test_bad_jsonl(tmp_path, content, message):
    with pytest.raises(WorkbenchError, match=message):
        read(tmp_path, content, name="pairs.jsonl")


def test_files_that_are_none(tmp_path):
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.csv").mkdir()
    for name in ("binary.csv", "absent.csv", "folder.csv"):
        with pytest.raises(WorkbenchError, match=f"Cannot read .*{name}"):
            read_pairs(tmp_path / name, CONFIG, None)
    with pytest.raises(WorkbenchError, match="Pairs come as .csv or .jsonl, got 'pairs.txt'"):
        read(tmp_path, HEADER, name="pairs.txt")
