import json

import pytest

from apps.cli import main
from workbench.store import new_run
from workbench.training.loop import train
from workbench.training.recipes import find_recipe

DONOR = ["--set", "steps=30", "--set", "size=300", "--set", "batch_size=32", "--set", "evaluate_every=30"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grafts")
    settings = ["steps=30", "size=600", "batch_size=32", "evaluate_every=30", "cooldown=0"]
    train(find_recipe("skills-smoke").override(settings), new_run("base", folder))
    for task, seed in (("tone", "0"), ("tone", "1"), ("ends", "0")):
        arguments = ["finetune", "base", task, "--seed", seed, "--run", f"{task}-{seed}", *DONOR]
        assert main([*arguments, "--runs", str(folder), "--json"]) == 0
    muon = ["finetune", "base", "tone", "--run", "tone-muon", *DONOR, "--set", "optimiser=muon", "--set", "steps=1"]
    assert main([*muon, "--set", "evaluate_every=1", "--runs", str(folder), "--json"]) == 0
    return folder


def said(capsys, *arguments):
    code = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_a_donor_is_told(runs, capsys):
    content = said(capsys, "finetune", "base", "topic", "--run", "topic-0", *DONOR, "--runs", str(runs))
    assert content["run"] == "topic-0"
    assert content["steps"] == 30
    assert 0 <= content["base_accuracy"] <= 1
    content = said(capsys, "finetune", "base", "topic", "--run", "topic-0", "--resume", "--runs", str(runs))
    assert content["steps"] == 30


def test_a_donor_without_a_name_is_found_again(runs, capsys):
    arguments = ("finetune", "base", "repeat", "--way", "adamw")
    made = said(capsys, *arguments, *DONOR, "--runs", str(runs))
    assert made["run"] == "skills-smoke-repeat-adamw"
    assert said(capsys, *arguments, "--resume", "--runs", str(runs))["run"] == made["run"]


def test_a_graft_is_judged_beside_its_controls(runs, capsys):
    content = said(capsys, "graft", "base", "tone-0", "--density", "0.02", "--foreign", "ends-0", "--runs", str(runs))
    assert {"weights", "density", "accuracy", "relative_gain", "agreement", "ece", "nll", "controls", "n", "seeds",
            "seconds"} < set(content)  # fmt: skip
    assert content["density"] == pytest.approx(0.02, abs=1e-4)
    assert content["seeds"] == 1
    assert content["n"] == 2000
    assert {"matched random", "magnitude", "permuted", "foreign", "donor without it"} < set(content["controls"])
    again = said(capsys, "graft", "base", "tone-0", "--density", "0.02", "--foreign", "ends-0", "--runs", str(runs))
    assert again["accuracy"] == content["accuracy"]


def test_donors_of_several_seeds_have_a_mean_with_an_interval(runs, capsys):
    content = said(capsys, "graft", "base", "tone-0", "tone-1", "--method", "saliency", "--runs", str(runs))
    assert content["seeds"] == 2
    accuracies = [each["accuracy"] for each in content["donors"]]
    assert content["accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert content["accuracy_low"] <= content["accuracy"] <= content["accuracy_high"]
    assert main(["graft", "base", "tone-0", "tone-1", "--method", "saliency", "--runs", str(runs)]) == 0
    assert capsys.readouterr().out.count("weights_of") == 2


def test_a_region_is_found_on_as_many_examples_as_are_asked_for(runs, capsys):
    asked = ("graft", "base", "tone-0", "--method", "saliency", "--density", "0.05", "--runs", str(runs))
    few, all_of_them = (said(capsys, *asked, *more) for more in (("--examples", "8"), ()))
    assert few["weights"] == all_of_them["weights"]
    assert few["nll"] != all_of_them["nll"]


def test_a_union_is_judged_on_each_task_and_elsewhere(runs, capsys):
    asked = ("union", "base", "tone-0", "ends-0", "--method", "magnitude", "--density", "0.02", "--runs", str(runs))
    content = said(capsys, *asked, "--elsewhere", "tone-1")
    weights = round(0.02 * content["weights"] / content["density"])
    assert weights <= content["weights"] <= 2 * weights
    assert [row["donor"] for row in content["kept"]] == ["tone-0", "ends-0"]
    alone = said(capsys, "graft", "base", "tone-0", *asked[4:])
    assert content["kept"][0]["graft_accuracy"] == alone["accuracy"]
    assert [row["task"] for row in content["elsewhere"]] == ["tone-1", "plain questions"]
    apart = {(row["region"], row["also_in"]): row["overlap"] for row in content["overlap"]}
    assert apart["tone-0", "tone-0"] == 1
    # A weight of both regions counts once.
    assert content["weights"] == 2 * weights - round(apart["tone-0", "ends-0"] * weights)
    assert [row["task"] for row in said(capsys, *asked)["elsewhere"]] == ["plain questions"]
    assert main([*asked]) == 0
    assert "union_gain" in capsys.readouterr().out


def test_tasks_in_sequence_are_tested_after_each(runs, capsys):
    asked = ("forget", "base", "tone-0", "ends-0", "--method", "magnitude", "--density", "0.05", "--runs", str(runs))
    content = said(capsys, *asked, "--seeds", "0,1")
    assert content["tasks"] == ["tone-0", "ends-0"]
    assert (content["n"], content["seeds"]) == (2000, 2)
    assert [row["way"] for row in content["ways"]] == ["all weights", "outside earlier regions", "own region"]
    steps = {(row["way"], row["learnt_last"], row["task"]): row["accuracy"] for row in content["steps"]}
    # Until the first region is taken, nothing is outside it: both ways begin alike, and with the base.
    assert steps["all weights", "tone-0", "ends-0"] == steps["outside earlier regions", "tone-0", "ends-0"]
    base = said(capsys, "graft", "base", "tone-0", "--method", "magnitude", "--runs", str(runs))["base"]["accuracy"]
    assert {steps[row["way"], "nothing", "tone-0"] for row in content["ways"]} == {base}
    assert main([*asked, "--seeds", "0"]) == 0
    assert "95 % bootstrap" in capsys.readouterr().out


def test_the_text_has_a_row_for_each(runs, capsys):
    assert main(["graft", "base", "tone-0", "--method", "magnitude", "--runs", str(runs)]) == 0
    text = capsys.readouterr().out
    assert "tone-0: magnitude, density 0.01" in text
    for name in ("base", "donor", "graft", "matched random", "permuted", "donor, temperature"):
        assert f"\n{name}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["graft", "base", "base"], "did not begin with 'base'"),
        (["graft", "tone-0", "ends-0"], "did not begin with 'tone-0' but with 'base'"),
        (["graft", "base", "tone-0", "ends-0"], "different tasks"),
        (["graft", "base", "tone-0", "--density", "0"], "density must be above 0"),
        (["graft", "base", "tone-0", "--density", "2"], "density must be above 0"),
        (["graft", "base", "tone-0", "--method", "best"], "Unknown method 'best'"),
        (["graft", "base", "tone-0", "--examples", "0"], "at least 1 example, got 0"),
        (["union", "base", "tone-0"], "two donors or more, got 1"),
        (["union", "base", "tone-0", "tone-0"], "two donors or more, got 1"),
        (["union", "base", "tone-0", "ends-0", "--density", "2"], "density must be above 0"),
        (["forget", "base", "tone-0"], "name two donors or more, got 1"),
        (["forget", "hf:minilm", "tone-0", "ends-0"], "not a real model"),
        (["forget", "base", "tone-muon", "ends-0"], "was trained by muon"),
        (["finetune", "base", "tunes"], "Did you mean 'tone'"),
        (["finetune", "gallery:modular", "tone"], "trained on their mixture"),
        (["finetune", "base", "tone", "--run", "tone-0", "--resume", "--seed", "3"], "leave --set and --seed out"),
    ],
)
def test_mistakes_are_one_line(runs, capsys, arguments, message):
    assert main([*arguments, "--runs", str(runs)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert err.strip().count("\n") == 0
