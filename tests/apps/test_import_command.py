"""`workbench import`, and every command on what it made."""

import json

import pytest
import torch
from safetensors.torch import save_file

from apps.cli import main
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer

# TransformerLens, a browser's engine or whole commands are started here: seconds each.
pytestmark = pytest.mark.slow

CONFIG = ModelConfig(n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=6, n_ctx=3, d_vocab=6, d_vocab_out=5)
WORDS = ("zero", "one", "two", "three", "four", "=")


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """Runs a command in a folder that holds a model, pairs and a vocabulary: its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    model = Transformer(CONFIG, generator=torch.Generator().manual_seed(0))
    save_file(model.state_dict(), "mine.safetensors")
    (tmp_path / "mine.json").write_text(json.dumps(CONFIG.to_json()))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    rows = [f"{WORDS[n]} one =,{WORDS[n]} two =,one,{WORDS[n]}" for n in range(5)]
    (tmp_path / "pairs.csv").write_text("clean,corrupt,answer,distractor\n" + "\n".join(rows))

    def run(*arguments):
        capsys.readouterr()
        code = main([*arguments, "--runs", "runs"])
        return code, *capsys.readouterr()

    return run


IMPORT = ("import", "mine.safetensors", "--pairs", "pairs.csv", "--vocab", "vocab.txt")


def test_from_the_import_to_the_patch_map(ask):
    code, out, _ = ask(*IMPORT, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["run"], found["pairs"], found["dropped"], found["n"]) == ("mine", 5, 1, 4)
    assert found["headroom"] == pytest.approx(found["clean"] - found["corrupt"])
    assert any("Only 4 pairs" in warning for warning in found["warnings"])
    for command in ("patch", "lens"):
        code, out, _ = ask(command, "mine", "--json")
        assert (code, json.loads(out)["n"]) == (0, 4)
        assert json.loads(out)["cells"]
    code, out, _ = ask("show", "mine", "--json")
    assert (code, json.loads(out)["status"], json.loads(out)["recipe"]) == (0, "imported", "imported")
    assert json.loads(ask("runs", "--json")[1])["runs"][0]["run"] == "mine"


def test_as_text_each_doubt_has_a_line(ask):
    code, out, _ = ask(*IMPORT, "--run", "again")
    assert code == 0
    assert out.splitlines()[0].split() == ["run", "again"]
    assert "Note: 1 of 5 pairs have the same answer and distractor and are left out." in out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fourier", "mine"), "needs a run on modular arithmetic; 'mine' learnt 'pairs'"),
        (
            ("train", "modular", "--run", "mine", "--resume"),
            "Run 'mine' was imported: it has no training to go on with",
        ),
        (IMPORT, "Run 'mine' exists"),
        (IMPORT[:4], "5 of 5 pairs are faulty. line 2: Token 'zero' is outside the vocabulary"),
        (("patch", "mine", "--split", "train"), "Unknown split 'train'. Known: test"),
    ],
)
def test_what_an_imported_run_cannot_do_is_one_line(ask, arguments, message):
    ask(*IMPORT)
    run = ("--run", "other") if arguments == IMPORT[:4] else ()
    code, out, err = ask(*arguments, *run)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert message in line
