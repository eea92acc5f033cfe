import torch

from kedit_daemon.serve.inference.stream import Answering, Told
from kedit_daemon.serve.inference.types import Part, Wish
from memory.model.editable import EditableModel


def test_who_leaves_while_a_token_is_taken_stays_away(model: EditableModel) -> None:
    told: list[Told] = []
    one = Answering(model, Wish(tuple(model.encode("It is"))), told.append)
    one.over = True  # by the event loop, which may do so at any moment of a step
    one.take(model.encode(" Rome")[-1], torch.zeros(0))
    assert told and one.over


def test_the_end_of_a_turn_ends_an_answer(model: EditableModel) -> None:
    told: list[Told] = []
    turn = model.encode(" Rome")[-1]
    model.model.generation_config.eos_token_id = turn
    Answering(model, Wish((1,)), told.append).take(turn, torch.zeros(0))
    assert told == [Part("", (), "stop", 0)]
