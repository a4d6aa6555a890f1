import inspect
import json
import shutil

import pytest
import torch

from apps.cli import build_parser, main
from apps.graft_pairs import is_donor, pair_of_runs, sibling_runs
from apps.graft_sections import GraftEvidence, describe_graft, gather_graft, graft_claims, graft_sections
from apps.grafting import USUAL, graft_in, keep_graft, kept_graft
from circuits.graft_judgement import JUDGEMENT, GraftJudgement, Judged
from circuits.grafting import Delta, Graft
from workbench.store import Provenance, new_run
from workbench.training.checkpoints import load
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


def test_a_donor_is_reported_with_its_graft_controls_and_siblings(runs):
    evidence = gather_graft(load("tone-0", runs=runs))
    assert evidence.foreign == "ends-0"
    assert {"foreign", "permuted"} < set(evidence.judgement.rows["weights_of"])
    sections = {section.title: section for section in graft_sections(evidence)}
    assert f"{len(evidence.judgement.graft):,} weights" in sections["The graft"].text
    names = [table.name for section in sections.values() for table in section.tables]
    assert names == [
        *("graft_gain", "reliability", "graft_places", "component_grafts", "graft_edges"),
        *("graft_sizes", "graft_overlap"),
    ]
    # Those of other skills are there, of the same one are not.
    assert {"tone-0", "ends-0"} <= set(evidence.overlaps.frame["region"])
    assert "tone-1" not in set(evidence.overlaps.frame["region"])
    assert describe_graft(evidence).endswith("One donor, one seed.")
    # The next report reads what this one kept.
    assert (
        kept_graft(evidence.pair, foreign=pair_of_runs(load("base", runs=runs), load("ends-0", runs=runs))) is not None
    )


def judgement_of(**right):
    """A judgement by hand: of 200 answers so many right, the first ones, each said with the same certainty."""
    change = {"weights.0.mlp.W_in": torch.ones(100, 2)}
    delta = Delta(base={name: torch.zeros_like(each) for name, each in change.items()}, change=change)
    mask = {name: torch.arange(200).reshape(each.shape) < 2 for name, each in change.items()}
    counts = {"base": 100, "donor": 200, "graft": 200, "matched random": 100, "permuted": 100, "foreign": 100} | right
    answers = torch.zeros(200, dtype=torch.long)
    logits = {name: torch.tensor([[3.0, 0.0]] * count + [[0.0, 3.0]] * (200 - count)) for name, count in counts.items()}
    # The graft answers with certainty, so that its calibration is better than the uniform share's.
    logits["graft"] *= 10
    logits["uniform 0.80"] = logits["donor"]
    return GraftJudgement(
        graft=Graft(delta=delta, mask=mask, method="learned"),
        judged=tuple(Judged(name=name, weights=2, logits=each, answers=answers) for name, each in logits.items()),
        temperature=1.0,
        examples=10,
        steps=3,
        provenance=Provenance(code_version="0"),
    )


@pytest.mark.parametrize(
    ("right", "fails"),
    [
        ({}, set()),
        # All of a gain of 0.08 is no gain to speak of.
        ({"base": 184, "matched random": 184, "permuted": 184, "foreign": 184}, {"accuracy gained"}),
        ({"graft": 188}, {"relative gain of the graft", "debiased calibration error"}),
        ({"matched random": 111}, {"control, matched random"}),
        ({"permuted": 131}, {"control, permuted"}),
        ({"foreign": 131}, {"control, foreign"}),
        ({"matched random": 110, "permuted": 130, "foreign": 130}, set()),
    ],
)
def test_what_a_report_expects_of_a_graft_holds_and_fails_by_its_bounds(right, fails):
    found = graft_claims(GraftEvidence(pair=None, judgement=judgement_of(**right)))
    assert len(found) == 6
    failed = {claim.statement for claim in found if not claim.holds}
    assert len(failed) == len(fails)
    assert all(any(statement.startswith(each) for statement in failed) for each in fails)


def test_the_share_of_a_uniform_change_is_read_off_its_name():
    found = judgement_of()
    assert found.uniform.name == "uniform 0.80"
    assert found.share == 0.8


def test_what_is_kept_is_what_is_found_where_nothing_is_said():
    parameters = inspect.signature(graft_in).parameters
    assert {name: parameters[name].default for name in USUAL} == USUAL
    told = vars(build_parser().parse_args(["graft", "base", "donor"]))
    assert {name: told[name] for name in USUAL} == USUAL


def test_a_damaged_run_beside_a_donor_is_no_sibling(runs):
    broken = runs / "broken"
    broken.mkdir()
    (broken / "recipe.json").write_text("{")
    assert "ends-0" in sibling_runs(load("tone-0", runs=runs))
    shutil.rmtree(broken)


def test_a_run_that_is_no_donor_has_no_graft(runs):
    assert not is_donor(load("base", runs=runs))
    assert is_donor(load("tone-0", runs=runs))


def test_a_kept_graft_without_its_file_is_found_again(runs):
    pair = pair_of_runs(load("base", runs=runs), load("tone-0", runs=runs))
    first = keep_graft(pair, method="magnitude", density=0.03)
    assert kept_graft(pair, method="magnitude", density=0.03)().summary() == first.summary()
    (file,) = (path for path in pair.folder.path.rglob(JUDGEMENT) if path.stat().st_mtime_ns == newest(pair))
    file.unlink()
    assert kept_graft(pair, method="magnitude", density=0.03) is None
    assert keep_graft(pair, method="magnitude", density=0.03).summary() == first.summary()


def newest(pair):
    return max(path.stat().st_mtime_ns for path in pair.folder.path.rglob(JUDGEMENT))


def test_a_skill_is_localised_over_seeds_by_one_command_that_goes_on(runs, capsys):
    asked = ("localise", "base", "tone", "--seeds", "0,1", *DONOR, "--method", "saliency", "--runs", str(runs))
    content = said(capsys, *asked)
    assert [row["run"] for row in content["taught"]] == ["skills-smoke-tone-l1-0", "skills-smoke-tone-l1-1"]
    assert content["seeds"] == 2
    assert content["relative_gain_low"] <= content["relative_gain"] <= content["relative_gain_high"]
    # Donors of other settings would be other donors; those that are there are not taught again.
    assert main([*asked, "--set", "steps=29"]) == 2
    assert "'skills-smoke-tone-l1-0' is there, and was made otherwise" in capsys.readouterr().err
    more = said(capsys, *(arguments if arguments != "0,1" else "0..2" for arguments in asked))
    assert more["taught"][:2] == content["taught"]
    assert more["donors"][:2] == content["donors"]
    assert more["seeds"] == 3
