import torch

from kedit_daemon.serve.inference.stream import AnswerStream, StreamItem
from kedit_daemon.serve.inference.types import AnswerPart, GenerationRequest
from memory.model.editable import EditableModel


def test_who_leaves_while_a_token_is_taken_stays_away(model: EditableModel) -> None:
    told: list[StreamItem] = []
    one = AnswerStream(model, GenerationRequest(tuple(model.encode("It is"))), told.append)
    one.is_over = True  # by the event loop, which may do so at any moment of a step
    one.add_token(model.encode(" Rome")[-1], torch.zeros(0))
    assert told and one.is_over


def test_the_end_of_a_turn_ends_an_answer(model: EditableModel) -> None:
    told: list[StreamItem] = []
    turn = model.encode(" Rome")[-1]
    model.hf_model.generation_config.eos_token_id = turn
    AnswerStream(model, GenerationRequest((1,)), told.append).add_token(turn, torch.zeros(0))
    assert told == [AnswerPart("", (), "stop", 0)]
