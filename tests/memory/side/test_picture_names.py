"""Pictures as names: the same picture, one that looks alike, another, and none."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_vision_models import draw_picture

from memory.errors import Rejected
from memory.model.editable import EditableModel
from memory.picture_marks import make_mark
from memory.side.picture_names import PictureNames

RED, BLUE = draw_picture(), draw_picture((20, 30, 220), size=(30, 14))
FACT, OTHER = "00000000000a", "00000000000b"


def move(data: bytes) -> bytes:
    """The same picture, a little to the side."""
    image = Image.open(io.BytesIO(data))
    made = io.BytesIO()
    image.transform(image.size, Image.Transform.AFFINE, (1, 0, 1, 0, 1, 0), fillcolor=240).save(
        made, "PNG"
    )
    return made.getvalue()


@pytest.fixture
def names(model_folder: Callable[[str], Path]) -> PictureNames:
    return PictureNames(EditableModel.load(model_folder("llava"), torch.device("cpu")), 0.85)


def add(names: PictureNames, data: bytes) -> str:
    assert names.model.pictures is not None
    return names.model.pictures.add(data).digest


def test_a_picture_is_called_by_the_one_that_a_fact_is_about(names: PictureNames) -> None:
    red, blue, moved = (add(names, data) for data in (RED, BLUE, move(RED)))
    names.add_fact(FACT, red, names.compute_keys(red))
    assert FACT in names and OTHER not in names
    assert names.rename(f"{make_mark(moved)} What?") == f"{make_mark(red)} What?"
    for kept in (f"{make_mark(red)} What?", f"{make_mark(blue)} What?", "What?"):
        assert names.rename(kept) == kept

    names.add_fact(OTHER, moved, names.compute_keys(moved))
    assert names.rename(make_mark(moved)) == make_mark(moved)  # its own facts alone
    names.remove_fact(OTHER)
    assert names.rename(make_mark(moved)) == make_mark(red)
    names.remove_fact(FACT)
    assert names.rename(make_mark(moved)) == make_mark(moved)


def test_two_facts_about_one_picture_are_told_apart_by_their_ids(names: PictureNames) -> None:
    red = add(names, RED)
    keys = names.compute_keys(red)
    assert keys.shape[0] == 9 and torch.allclose(keys.norm(dim=1), torch.ones(9))
    for fact in (FACT, OTHER):
        names.add_fact(fact, red, keys)
    names.remove_fact(FACT)
    assert OTHER in names and names.rename(make_mark(red)) == make_mark(red)


def test_a_picture_that_is_not_there_and_a_model_without_sight_are_told(
    names: PictureNames, model: EditableModel
) -> None:
    with pytest.raises(Rejected, match="there is no picture 00") as caught:
        names.compute_keys("0" * 32)
    assert "hand the picture in again" in caught.value.hint
    with pytest.raises(Rejected, match="takes no pictures") as caught:
        PictureNames(model, 0.9).compute_keys("0" * 32)
    assert "vision-language" in caught.value.hint
