import torch

from kedit_daemon.serve.answering import Answering, Told
from kedit_daemon.serve.wish import Wish
from memory.model import EditableModel


def test_who_leaves_while_a_token_is_taken_stays_away(model: EditableModel) -> None:
    told: list[Told] = []
    one = Answering(model, Wish(tuple(model.encode("It is"))), told.append)
    one.over = True  # by the event loop, which may do so at any moment of a step
    one.take(model.encode(" Rome")[-1], torch.zeros(0))
    assert told and one.over
