"""What a text's words say by themselves: the answers that a Transformer Program's are compared with.

They read the same tokens of the same splits. None has anything to choose on `val`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from jaxtyping import Int
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor

from workbench.tasks.base import Batch
from workbench.tasks.words import Words

BESIDE = (-1, 0, 1)
"""The places that an answer about a word is read from: the word and its neighbours."""
ROUNDS = 3000


def majority(task: Words, batch: Batch) -> Int[Tensor, "text pos"]:
    """The label that is most frequent in training, everywhere."""
    train = task.examples("train")
    return torch.full_like(batch.targets, int(train.targets[train.read].mode().values))


def logistic(task: Words, batch: Batch) -> Int[Tensor, "text pos"]:
    """What a logistic regression says: of how often each word stands in a text, or of a word and its neighbours."""
    train = task.examples("train")
    model = make_pipeline(DictVectorizer(), LogisticRegression(max_iter=ROUNDS))
    model.fit(list(_features(task, train)), train.targets[train.read].numpy())
    said = torch.zeros_like(batch.targets)
    said[batch.read] = torch.from_numpy(model.predict(list(_features(task, batch))))
    return said


def _features(task: Words, batch: Batch) -> Iterator[dict[str, int]]:
    """What each answer is told from."""
    for tokens, read in zip(batch.tokens.tolist(), batch.read, strict=True):
        if task.pooled:
            yield Counter(str(token) for token in tokens if token != task.pad_token)
        else:
            for place in read.nonzero()[:, 0].tolist():
                yield {f"{step} {tokens[place + step]}": 1 for step in BESIDE}
