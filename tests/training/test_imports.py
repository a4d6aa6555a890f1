import json

import pytest
import torch
from safetensors.torch import save_file

from circuits.patching import patch_each
from workbench.models.transformer import ModelConfig, Transformer
from workbench.runtime import WorkbenchError
from workbench.store import run_names
from workbench.training.checkpoints import load
from workbench.training.imports import import_run

CONFIG = ModelConfig(n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=6, n_ctx=3, d_vocab=6, d_vocab_out=5)
GOOD = "clean,corrupt,answer,distractor\n0 1 5,0 2 5,1,2\n3 1 5,4 1 5,2,3\n1 1 5,1 2 5,4,4\n"


@pytest.fixture
def model_file(tmp_path):
    model = Transformer(CONFIG, generator=torch.Generator().manual_seed(0))
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    (tmp_path / "mine.json").write_text(json.dumps(CONFIG.to_json()))
    return tmp_path / "mine.safetensors"


def pairs_file(folder, content=GOOD, name="pairs.csv"):
    path = folder / name
    path.write_text(content)
    return path


def test_a_model_and_pairs_become_a_run_that_can_be_patched(model_file, tmp_path):
    runs = tmp_path / "runs"
    run, findings = import_run(str(model_file), pairs_file(tmp_path), name="mine", runs=runs)
    assert run_names(runs) == ["mine"]
    assert findings.summary()["pairs"] == 3
    assert findings.summary()["dropped"] == 1
    assert findings.n == 2
    assert findings.length == (3, 3)
    assert findings.differing == (1, 1.0, 1)
    assert findings.headroom_interval[0] <= findings.headroom <= findings.headroom_interval[1]
    assert any("1 of 3 pairs have the same answer" in warning for warning in findings.warnings)
    assert findings.tables()[0].frame.shape[0] == 6
    found = patch_each(load("mine", runs=runs).model(), run.task.sample(2), sites="resid_pre,z")
    assert found.n == 2
    before = Transformer(CONFIG, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run.model()(torch.tensor([[0, 1, 5]])), before(torch.tensor([[0, 1, 5]])))
    assert run.status["reason"] == "imported"
    assert run.recipe.train is None


def test_jsonl_with_words(model_file, tmp_path):
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("zero\none\ntwo\nthree\nfour\n=\n")
    rows = [{"clean": "zero one =", "corrupt": "zero two =", "answer": "one", "distractor": "two"}]
    pairs = pairs_file(tmp_path, "\n".join(map(json.dumps, rows)), "pairs.jsonl")
    run, findings = import_run(str(model_file), pairs, name="words", vocab=vocab, runs=tmp_path / "runs")
    assert run.task.decode([0, 1, 5]) == "zero one ="
    assert findings.pairs == 1


def test_a_function_of_the_users_own(tmp_path):
    source = tmp_path / "my_model.py"
    source.write_text(
        "from workbench.models.transformer import ModelConfig, Transformer\n"
        "def make():\n"
        "    sizes = dict(n_layers=1, d_model=4, n_heads=1, d_head=4, d_mlp=0, n_ctx=3, d_vocab=6, d_vocab_out=5)\n"
        "    return Transformer(ModelConfig(**sizes), generator=None)\n"
    )
    run, _ = import_run(f"{source}:make", pairs_file(tmp_path), name="made", runs=tmp_path / "runs")
    assert run.recipe.model.d_mlp == 0


def test_a_model_that_ignores_the_change_is_warned_about(tmp_path):
    model = Transformer(CONFIG, generator=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    (tmp_path / "mine.json").write_text(json.dumps(CONFIG.to_json()))
    _, findings = import_run(str(tmp_path / "mine.safetensors"), pairs_file(tmp_path), name="flat", runs=tmp_path / "r")
    assert findings.headroom == 0
    assert any("hardly tells clean from corrupt" in warning for warning in findings.warnings)


HEADER = "clean,corrupt,answer,distractor\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no pairs"),
        ("clean,corrupt,answer\n0,1,2\n", "lacks distractor"),
        (HEADER + "0 1,0,1,2\n", "line 2: clean has 2 tokens and corrupt 1"),
        (HEADER + "0 1,0 1,1,2\n", "line 2: clean and corrupt are the same prompt"),
        (HEADER + "0 9,0 1,1,2\n", "line 2: Token '9' is outside the vocabulary of 6 tokens"),
        (HEADER + "0 1,0 2,5,2\n", "line 2: answer must be one token that the model predicts \\(0 to 4\\)"),
        (HEADER + "0 1,0 2,1 1,2\n", "answer must be one token"),
        (HEADER + "0 1 2 3,0 1 2 4,1,2\n", "4 tokens are more than the model reads \\(3\\)"),
        (HEADER + "0 1,0 2,1,2\n0 1 2,0 1 3,1,2\n", "differ in length, and the model has no padding token"),
        (HEADER + "0 1,0 2,1,1\n", "Every pair has the same answer and distractor"),
        (HEADER + "0 9,0 1,1,2\n" * 7, "7 of 7 pairs are faulty.*And 2 more"),
    ],
)
def test_bad_pairs_are_one_error_and_nothing_is_written(model_file, tmp_path, content, message):
    runs = tmp_path / "runs"
    with pytest.raises(WorkbenchError, match=message):
        import_run(str(model_file), pairs_file(tmp_path, content), name="x", runs=runs)
    assert not runs.exists()


def test_bad_files_are_one_error(model_file, tmp_path):
    pairs, runs = pairs_file(tmp_path), tmp_path / "runs"
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00")
    foreign = tmp_path / "foreign.pt"
    foreign.write_bytes(b"not a state dict")
    (tmp_path / "foreign.json").write_text("{}")
    (tmp_path / "bare.safetensors").write_bytes(model_file.read_bytes())
    cases = [
        ((str(model_file), binary), "Cannot read .*binary.csv"),
        ((str(model_file), tmp_path / "absent.csv"), "Cannot read .*absent.csv"),
        ((str(model_file), pairs_file(tmp_path, GOOD, "pairs.txt")), "Pairs come as .csv or .jsonl"),
        ((str(model_file), pairs_file(tmp_path, "{", "broken.jsonl")), "line 1 is not JSON"),
        ((str(foreign), pairs), "Cannot read .*foreign.pt as a state dict"),
        ((str(tmp_path / "bare.safetensors"), pairs), "Cannot read .*bare.json"),
        (("nonsense", pairs), "'nonsense' is no model"),
        ((str(tmp_path / "none.py") + ":make", pairs), "No Python file"),
    ]
    for (model, file), message in cases:
        with pytest.raises(WorkbenchError, match=message):
            import_run(model, file, name="x", runs=runs)
    assert not runs.exists()


def test_a_taken_name_and_a_bad_name_are_refused(model_file, tmp_path):
    runs = tmp_path / "runs"
    import_run(str(model_file), pairs_file(tmp_path), name="mine", runs=runs)
    with pytest.raises(WorkbenchError, match="Run 'mine' exists"):
        import_run(str(model_file), pairs_file(tmp_path), name="mine", runs=runs)
    with pytest.raises(WorkbenchError, match="must be letters"):
        import_run(str(model_file), pairs_file(tmp_path), name="../mine", runs=runs)


def test_torch_format_is_read_without_running_anything(model_file, tmp_path):
    state = Transformer(CONFIG, generator=torch.Generator().manual_seed(0)).state_dict()
    torch.save(state, tmp_path / "mine.pt")
    run, _ = import_run(str(tmp_path / "mine.pt"), pairs_file(tmp_path), name="pt", runs=tmp_path / "runs")
    assert torch.equal(run.model().state_dict()["embed.W_E"], state["embed.W_E"])
    torch.save({"w": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "evil.json").write_text(json.dumps(CONFIG.to_json()))
    with pytest.raises(WorkbenchError, match="Cannot read .*evil.pt as a state dict"):
        import_run(str(tmp_path / "evil.pt"), pairs_file(tmp_path), name="evil", runs=tmp_path / "runs")


class Evil:
    """What a hostile file would hold."""

    def __reduce__(self):
        return (print, ("ran",))
