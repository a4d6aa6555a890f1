"""A model and pairs of the user's own: every way in, and nothing written where one is barred."""

import json
import math
import os
import resource
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from circuits.patching import patch_each
from probes.logit_lens import logit_lens
from workbench.instrument.passes import run as run_model
from workbench.instrument.sites import Site
from workbench.instrument.trace import FromTrace, Patch
from workbench.metrics import metric
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.store import run_names
from workbench.training.checkpoints import load
from workbench.training.imports import examine, import_run, read_model
from workbench.training.pair_files import read_pairs

CONFIG = ModelConfig(n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=6, n_ctx=3, d_vocab=6, d_vocab_out=5)
GOOD = "clean,corrupt,answer,distractor\n0 1 5,0 2 5,1,2\n3 1 5,4 1 5,2,3\n1 1 5,1 2 5,4,4\n"
TOKENS = torch.cartesian_prod(*[torch.arange(6)] * 3)


def build(**changes):
    return Transformer(replace(CONFIG, **changes), generator=torch.Generator().manual_seed(0)).eval()


def save(path, model):
    save = save_file if path.suffix == ".safetensors" else torch.save
    save(model.state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(model.config.to_json()))
    return path


@pytest.fixture
def model_file(tmp_path):
    return save(tmp_path / "mine.safetensors", build())


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(GOOD)
    return path


# What becomes of them.


def test_a_model_and_pairs_become_a_run(model_file, pairs, tmp_path):
    runs = tmp_path / "runs"
    run, findings = import_run(str(model_file), pairs, name="mine", runs=runs)
    assert run_names(runs) == ["mine"]
    assert sorted(path.name for path in runs.iterdir()) == ["mine"]
    assert sorted(path.name for path in (runs / "mine").iterdir()) == ["checkpoints", "recipe.json", "status.json"]
    again = load("mine", runs=runs)
    assert again.recipe == run.recipe
    assert (again.recipe.name, again.recipe.train, again.recipe.minutes) == ("imported", None, None)
    assert again.recipe.shows == "Imported from mine.safetensors."
    assert torch.equal(again.model()(TOKENS), build()(TOKENS))
    [checkpoint] = again.checkpoints
    assert (checkpoint.step, checkpoint.reasons, checkpoint.dtype) == (0, ("imported",), "float32")
    assert findings.provenance == again.model().provenance
    assert again.status == {"finished": True, "reason": "imported", "seconds": None}
    # Nothing was trained, and nothing claims it was.
    assert again.log.rows == []
    assert again.log.tables() == []
    assert again.log.landmarks() == {}


def test_the_run_can_be_patched_and_read(model_file, pairs, tmp_path):
    run, _ = import_run(str(model_file), pairs, name="mine", runs=tmp_path / "runs")
    # More are asked for than there are: what was found says how many it is of.
    batch = run.task.sample(64)
    found = patch_each(run.model(), batch, sites="resid_pre,resid_post,z", position_labels=run.task.position_labels)
    assert (found.n, found.dropped) == (2, 1)
    effect = {(str(cell.site), cell.position): found.effect[:, index] for index, cell in enumerate(found.cells)}
    assert effect["L0.resid_post", 2].tolist() == pytest.approx([1, 1], abs=1e-5)
    assert effect["L0.resid_post", 0].tolist() == [0, 0]
    assert logit_lens(run.model(), batch, position_labels=run.task.position_labels).n == 2


def test_prompts_that_end_at_different_places_are_patched_where_they_are_read(tmp_path):
    file = save(tmp_path / "mine.safetensors", build(pad_token=5))
    (tmp_path / "pairs.csv").write_text("clean,corrupt,answer,distractor\n0 1,0 2,1,2\n3 1 0,4 1 0,2,3\n2,1,3,0\n")
    run, findings = import_run(str(file), tmp_path / "pairs.csv", name="mine", runs=tmp_path / "runs")
    assert findings.length == (1, 3)
    assert any("1 to 3 tokens long" in warning for warning in findings.warnings)
    batch, model, measure = run.task.contrast(run.task.examples("test")), run.model(), metric("logit_difference")
    clean, corrupt = run_model(model, batch.tokens, record=["L0.resid_mid"]), run_model(model, batch.corrupt)
    found = patch_each(model, batch, sites="L0.resid_mid", direction="denoise")
    for position in range(3):
        patch = Patch(site=Site.parse("L0.resid_mid"), source=FromTrace(clean), positions=[position])
        patched = run_model(model, batch.corrupt, patches=[patch])
        values = [measure(trace.logits[batch.read], batch).mean() for trace in (clean, corrupt, patched)]
        wanted = (values[2] - values[1]) / (values[0] - values[1])
        assert found.effect[0, position].item() == pytest.approx(wanted.item(), abs=1e-4)
    assert found.effect.abs().min() > 0.01


# What the validator finds.


def answers_last_token(strength=3.0):
    """A model whose only logit that is not 0 is `strength`, at the token it stands on."""
    model = build(d_mlp=0, biases=(), d_model=6, d_vocab_out=6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E.copy_(torch.eye(6))
        model.unembed.W_U.copy_(strength * torch.eye(6))
    return model


def findings_of(tmp_path, model, *rows):
    path = tmp_path / "some.csv"
    path.write_text("clean,corrupt,answer,distractor\n" + "".join(f"{row}\n" for row in rows))
    return examine(model, read_pairs(path, model.config, None))


def test_findings_worked_by_hand(tmp_path):
    # Logit differences: clean 3, corrupt -3; clean 0, corrupt 3 (a wrong answer); the last has no headroom.
    rows = ("0 0 1,0 0 2,1,2", "0 1 5,2 3 1,1,2", "0 0 3,0 1 3,4,4")
    found = findings_of(tmp_path, answers_last_token(), *rows)
    assert (found.pairs, found.dropped, found.n) == (3, 1, 2)
    assert found.length == (3, 3)
    assert found.differing == (1, 2.0, 3)
    assert (found.accuracy, found.clean, found.corrupt, found.headroom) == (0.5, 1.5, 0.0, 1.5)
    assert found.headroom_interval == (-3.0, 6.0)
    text = "\n".join(found.warnings)
    for words in (
        "1 of 3 pairs have the same answer and distractor",
        "Only 2 pairs",
        "differ at up to 3 positions",
        "hardly tells clean from corrupt: headroom 1.5 logits, 95 % interval -3 to 6 (n = 2)",
    ):
        assert words in text
    assert len(found.warnings) == 4
    summary = found.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["pairs"], summary["dropped"], summary["n"], summary["headroom"]) == (3, 1, 2, 1.5)
    [table] = found.tables()
    assert table.frame.set_index("finding").loc["headroom"].tolist() == ["1.5 (-3 to 6)", "logits, n = 2"]
    assert table.latex()


def test_good_pairs_raise_no_doubt_and_bad_ones_do(tmp_path):
    rows = [f"0 {n} 1,0 {n} 2,1,2" for n in range(6)] + [f"{n} 0 3,{n} 0 4,3,4" for n in range(6)]
    assert findings_of(tmp_path, answers_last_token(), *rows).warnings == ()
    # The same pairs on a model that is deaf to the change, and on one that says the opposite.
    deaf, contrary = (findings_of(tmp_path, answers_last_token(strength), *rows) for strength in (0.0, -3.0))
    assert deaf.headroom == 0
    assert any("hardly tells clean from corrupt" in warning for warning in deaf.warnings)
    assert (contrary.clean, contrary.corrupt, contrary.headroom) == (-3, 3, -6)
    assert any("answers only 0% of the clean prompts right (n = 12)" in warning for warning in contrary.warnings)


def test_a_large_vocabulary_is_measured_in_parts(tmp_path, monkeypatch):
    rows = [f"0 {n} 1,0 {n} {n},1,2" for n in (0, 2, 3, 4, 5)]
    model = build(d_vocab_out=6)
    whole = findings_of(tmp_path, model, *rows)
    monkeypatch.setattr("workbench.training.imports.LOGITS", 2 * 3 * 6)
    parts = findings_of(tmp_path, model, *rows)
    assert parts.headroom == pytest.approx(whole.headroom, rel=1e-6)
    assert parts.headroom_interval == pytest.approx(whole.headroom_interval, rel=1e-6)


def test_nothing_to_measure_is_refused(tmp_path):
    with pytest.raises(WorkbenchError, match="Every pair has the same answer and distractor"):
        findings_of(tmp_path, build(), "0 1,0 2,1,1")
    broken = build()
    with torch.no_grad():
        broken.embed.W_E[1] = math.nan
    with pytest.raises(WorkbenchError, match="logits on these prompts are not finite"):
        findings_of(tmp_path, broken, "0 1,0 2,1,2")


# The ways in.


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("half", [False, True])
def test_our_own_state_dicts(tmp_path, suffix, half):
    model = build(normalization="LN", tied=True, d_vocab_out=6, biases=("attn", "mlp", "unembed"), schedule=(0, 0))
    model = model.half() if half else model
    found = read_model(str(save(tmp_path / f"mine{suffix}", model)))
    assert found.config == model.config
    assert torch.equal(found(TOKENS), model.float()(TOKENS))
    assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.float32}


def test_weights_of_a_gpu_are_read_without_one(tmp_path):
    file = save(tmp_path / "mine.pt", build())
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "gpu.pt", "w") as archive:
        for name, content in entries.items():
            # The device as the file names it: a string of 3 bytes becomes one of 6.
            archive.writestr(name, content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    assert b"cuda:0" in (tmp_path / "gpu.pt").read_bytes()
    (tmp_path / "gpu.json").write_text((tmp_path / "mine.json").read_text())
    assert torch.equal(read_model(str(tmp_path / "gpu.pt"))(TOKENS), build()(TOKENS))


def hooked(model):
    """The state dict and config that a HookedTransformer with the same weights would have written."""
    renamed = {"weights": "blocks", "final_norm": "ln_final"}
    state = {}
    for name, tensor in model.state_dict().items():
        first, dot, rest = name.partition(".")
        state[renamed.get(first, first) + dot + rest] = tensor
    state["blocks.0.attn.mask"] = torch.ones(3, 3).tril().bool()
    names = ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "n_ctx", "d_vocab", "d_vocab_out")
    fields = {name: getattr(model.config, name) for name in names}
    return state, {**fields, "act_fn": "relu", "normalization_type": "LN", "eps": 1e-5, "dtype": "torch.float32"}


def test_a_hooked_transformers_state_dict(tmp_path, pairs):
    model = build(normalization="LN", biases=("attn", "mlp", "unembed"))
    state, config = hooked(model)
    torch.save(state, tmp_path / "theirs.pth")
    (tmp_path / "theirs.json").write_text(json.dumps(config))
    run, _ = import_run(str(tmp_path / "theirs.pth"), pairs, name="theirs", runs=tmp_path / "runs")
    assert torch.allclose(run.model()(TOKENS), model(TOKENS), atol=1e-6)


def save_gpt2(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=3, vocab_size=6, bos_token_id=0, eos_token_id=0)
        model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return model


def test_a_hugging_face_folder(tmp_path, pairs):
    model = save_gpt2(tmp_path / "tiny")
    run, _ = import_run(f"{tmp_path}/tiny/", pairs, name="tiny", runs=tmp_path / "runs")
    assert torch.allclose(run.model()(TOKENS), model(TOKENS).logits, atol=1e-6)
    assert run.recipe.shows == "Imported from tiny."


def test_a_hugging_face_folder_without_all_weights_is_refused(tmp_path):
    save_gpt2(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["transformer.h.0.mlp.c_fc.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # Hugging Face's own loader would draw them at random.
    with pytest.raises(WorkbenchError, match="does not fit its config: missing h.0.mlp.c_fc.weight"):
        read_model(str(tmp_path))


FUNCTIONS = """
import torch
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer


def ours():
    config = ModelConfig(n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=6, n_ctx=3, d_vocab=6, d_vocab_out=5)
    return Transformer(config, generator=torch.Generator().manual_seed(0))


def bridge():
    from workbench.models.bridges import to_bridge
    return to_bridge(ours())[0]


class Odd(Transformer):
    def forward(self, tokens, edits=None):
        return -super().forward(tokens, edits)


def odd():
    return Odd(ours().config, generator=None)


def linear():
    return torch.nn.Linear(2, 2)


def fails():
    return ours().no_such_thing


not_a_function = 3
"""


@pytest.fixture
def functions(tmp_path):
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return tmp_path / "functions.py"


@pytest.mark.parametrize("name", ["ours", "bridge"])
def test_a_function_of_the_users_own(functions, pairs, tmp_path, name):
    run, _ = import_run(f"{functions}:{name}", pairs, name=name, runs=tmp_path / "runs")
    assert torch.allclose(run.model()(TOKENS), build()(TOKENS), atol=1e-6)
    assert run.recipe.shows == f"Imported from functions.py:{name}."


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "has no function 'absent' that returns a model"),
        ("not_a_function", "has no function 'not_a_function'"),
        ("odd", "returned a Odd; it must return a Transformer or a TransformerBridge"),
        ("linear", "returned a Linear; it must return a Transformer or a TransformerBridge.*nnsight_model"),
        ("fails", "Cannot make a model of .*functions.py:fails: AttributeError: .*no_such_thing"),
    ],
)
def test_functions_that_make_no_model(functions, name, message):
    with pytest.raises(WorkbenchError, match=message):
        read_model(f"{functions}:{name}")


def test_no_random_number_is_drawn(model_file):
    state = torch.get_rng_state()
    read_model(str(model_file))
    assert torch.equal(torch.get_rng_state(), state)


# What is barred.


class Evil:
    """What a hostile file would hold."""

    def __reduce__(self):
        return (os.mkdir, ("evil-ran",))


def bad_models(folder):
    """References that are no model, each with what is said."""
    ours = save(folder / "ours.safetensors", build())
    content, config = ours.read_bytes(), CONFIG.to_json()

    def file(name, weights, config):
        (folder / name).write_bytes(weights)
        (folder / name).with_suffix(".json").write_text(config if isinstance(config, str) else json.dumps(config))
        return str(folder / name)

    yield "nonsense", "'nonsense' is no model: give a file"
    yield str(folder / "absent.pt"), "No model file .*absent.pt"
    yield str(folder / "none.py") + ":make", "No Python file"
    yield str(folder), "has no config.json. Give the folder that save_pretrained"
    yield file("text.pt", b"not a state dict", config), "Cannot read .*text.pt as a state dict"
    yield file("empty.pt", b"", config), "Cannot read .*empty.pt as a state dict"
    yield file("cut.safetensors", content[:-7], config), "Cannot read .*cut.safetensors as a state dict"
    yield file("config.safetensors", content, "{"), "Cannot read .*config.json"
    yield file("list.safetensors", content, "[]"), "holds a list, not a JSON object"
    yield file("lacks.safetensors", content, {}), "Cannot make a model of .*lacks.safetensors: TypeError.*'n_layers'"
    # The card of a checkpoint is not the config of a model.
    yield file("card.safetensors", content, {"step": 3, "sha256": ""}), "is not a ModelConfig: unknown sha256, step"
    yield file("kind.safetensors", content, {**config, "causal": "no"}), "ModelConfig: causal='no' is not of its kind"
    yield file("wide.safetensors", content, {**config, "d_model": 9}), "do not fit the config: size mismatch for"
    yield file("deep.safetensors", content, {**config, "n_layers": 2}), "do not fit the config: Missing key.*weights.1"
    yield file("zero.safetensors", content, {**config, "n_layers": 0}), "n_layers must be at least 1"
    for name, held, said in [
        ("evil.pt", {"weights.0.x": Evil()}, "Cannot read .*evil.pt as a state dict"),
        ("nested.pt", {"model": {"weights.0.x": torch.zeros(1)}}, "is not a state dict: it must map names to tensors"),
        ("numbers.pt", {0: torch.zeros(1)}, "is not a state dict: it must map names to tensors"),
        ("other.pt", {"layer.weight": torch.zeros(1)}, "holds layer.weight, …: neither the workbench's names"),
        ("nothing.pt", {}, "holds nothing, …: neither"),
    ]:
        torch.save(held, folder / name)
        yield file(name, (folder / name).read_bytes(), config), said
    save_file(hooked(build())[0], folder / "theirs.safetensors")
    (folder / "theirs.json").write_text(json.dumps(config))
    yield str(folder / "theirs.safetensors"), "its config lacks act_fn"
    (folder / "theirs.json").write_text(json.dumps({**hooked(build())[1], "n_layers": "two"}))
    yield str(folder / "theirs.safetensors"), "its config lacks n_layers"
    (folder / "ours.json").unlink()
    yield str(ours), "needs its config beside it in ours.json"
    (folder / "config.json").write_text("{")
    yield str(folder), "Cannot read .*config.json"


def test_bad_models_are_one_line_and_nothing_is_written(tmp_path, pairs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    for reference, message in bad_models(tmp_path):
        with pytest.raises(WorkbenchError, match=message) as caught:
            import_run(reference, pairs, name="x", runs=runs)
        assert "\n" not in str(caught.value)
    assert not runs.exists()
    assert not (tmp_path / "evil-ran").exists()


def test_bad_pairs_leave_nothing_behind(model_file, tmp_path):
    (tmp_path / "bad.csv").write_text(GOOD + "0 9,0 1,1,2\n")
    with pytest.raises(WorkbenchError, match="1 of 4 pairs are faulty. line 5: Token '9'"):
        import_run(str(model_file), tmp_path / "bad.csv", name="x", runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", "Run 'mine' exists at .*. Choose another --run"),
        ("../mine", "must be letters"),
        ("", "must be letters"),
    ],
)
def test_a_taken_name_and_a_bad_name_are_refused(model_file, pairs, tmp_path, name, message):
    runs = tmp_path / "runs"
    import_run(str(model_file), pairs, name="mine", runs=runs)
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    with pytest.raises(WorkbenchError, match=message):
        import_run(str(model_file), pairs, name=name, runs=runs)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


def test_a_run_that_cannot_be_finished_leaves_no_trace(model_file, pairs, tmp_path, monkeypatch):
    runs = tmp_path / "runs"

    def full(path, content):
        raise OSError(28, "No space left on device")

    # The last file that is written: weights and status lie there already.
    monkeypatch.setattr("workbench.training.imports.write_json", full)
    with pytest.raises(WorkbenchError, match="Cannot write .*mine: No space left on device"):
        import_run(str(model_file), pairs, name="mine", runs=runs)
    assert list(runs.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_is_really_full(model_file, pairs, tmp_path):
    code = (
        "import signal, sys; from pathlib import Path; from workbench.training.imports import import_run\n"
        "import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (500, {resource.RLIM_INFINITY}))\n"
        "import_run(sys.argv[1], Path(sys.argv[2]), name='mine', runs=Path(sys.argv[3]))"
    )
    arguments = [sys.executable, "-c", code, str(model_file), str(pairs), str(tmp_path / "runs")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert "WorkbenchError: Cannot write" in done.stderr.splitlines()[-1]
    assert list((tmp_path / "runs").iterdir()) == []
