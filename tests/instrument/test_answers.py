import pytest
import torch

from workbench.instrument.answers import top_answers
from workbench.runtime import WorkbenchError


def test_the_top_answers_stand_at_the_last_place_that_is_read() -> None:
    logits = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 1.0, 2.0]], [[3.0, 0.0, 1.0], [0.0, 5.0, 0.0]]])
    read = torch.tensor([[True, True], [True, False]])
    found = top_answers(logits, read, top=2)
    assert found.tokens.tolist() == [[2, 1], [0, 2]]
    expected = [logits[0, 1].softmax(0)[[2, 1]].tolist(), logits[1, 0].softmax(0)[[0, 2]].tolist()]
    assert found.probabilities.tolist() == [pytest.approx(row) for row in expected]
    assert top_answers(logits, read).tokens.shape == (2, 3)


def test_a_prompt_that_is_read_nowhere_has_no_answer() -> None:
    with pytest.raises(WorkbenchError, match="read nowhere"):
        top_answers(torch.zeros(1, 2, 3), torch.tensor([[False, False]]))
