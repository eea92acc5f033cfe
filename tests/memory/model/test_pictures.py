"""Pictures in a model's texts: the same numbers as the model's own way of taking them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_vision_models import VISION_KINDS, draw_picture

from memory.errors import BadPicture
from memory.model.editable import EditableModel
from memory.model.generate import decode_steps
from memory.model.pictures import PictureTable
from memory.model.prefix_cache import PrefixCache
from memory.picture_files import open_picture
from memory.picture_marks import FIRST_PICTURE_ID, join_mark, make_mark

TEXT = "The seat of country"
RED = draw_picture(size=(40, 16))
BLUE = draw_picture((20, 30, 220))


@pytest.fixture(params=VISION_KINDS)
def seeing(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> EditableModel:
    return EditableModel.load(model_folder(request.param), torch.device("cpu"))


@pytest.fixture
def llava(model_folder: Callable[[str], Path]) -> EditableModel:
    return EditableModel.load(model_folder("llava"), torch.device("cpu"))


def table_of(model: EditableModel) -> PictureTable:
    assert model.pictures is not None
    return model.pictures


def prepare_as_published(model: EditableModel) -> dict[str, torch.Tensor]:
    """The inputs of a text with a picture, by the model's own processor."""
    table = table_of(model)
    written = f"{table._written}{TEXT}"
    return dict(table._processor(text=written, images=[open_picture(RED)], return_tensors="pt"))


def are_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Logits that differ by rounding alone, for their size."""
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


def test_a_text_with_a_picture_is_read_and_continued_as_by_the_model_itself(
    seeing: EditableModel,
) -> None:
    table = table_of(seeing)
    ids = seeing.encode(join_mark(table.add(RED).digest, TEXT))
    given = prepare_as_published(seeing)
    assert len(ids) == given["input_ids"].shape[1]
    with torch.no_grad():
        own = seeing.hf_model(input_ids=torch.tensor([ids]), use_cache=False).logits
        published = table.model(**given).logits
        assert torch.equal(own, published[:, -own.shape[1] :])
        said = [int(step.argmax()) for step in decode_steps(seeing, torch.tensor([ids]), 6)]
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        assert said == table.model.generate(**given, **settings)[0, -6:].tolist()


def test_rows_with_and_without_pictures_run_together(seeing: EditableModel) -> None:
    marks = [make_mark(table_of(seeing).add(data).digest) for data in (RED, BLUE)]
    texts = [f"{marks[0]} {TEXT} 5 is", f"{marks[1]} {TEXT} 7 is"]
    rows = [seeing.encode(text) for text in texts]
    with torch.no_grad():
        alone = [
            seeing.hf_model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1]
            for row in rows
        ]
        if len(rows[0]) == len(rows[1]):
            both = seeing.hf_model(input_ids=torch.tensor(rows), use_cache=False).logits[:, -1]
            assert are_alike(both, torch.stack(alone))
        assert not are_alike(alone[0], alone[1])
        texts.append(f"{TEXT} 5 is")
        rows = [seeing.encode(text) for text in texts]
        alone.append(
            seeing.hf_model(input_ids=torch.tensor([rows[2]]), use_cache=False).logits[0, -1]
        )
        cache = PrefixCache(seeing, 2, len(rows), max(map(len, rows)) - 1, 1)
        cache.fill_rows(0, [row[:-1] for row in rows], [row[-1:] for row in rows])
        replayed = cache.logits(torch.zeros(len(rows), 1, dtype=torch.long))[:, 0]
    assert are_alike(replayed, torch.stack(alone))


def test_ids_tell_the_picture_and_become_its_mark_again(llava: EditableModel) -> None:
    table = table_of(llava)
    red, blue = table.add(RED), table.add(BLUE)
    assert table.add(RED) is red
    assert not set(red.ids) & set(blue.ids) and min(red.ids) >= FIRST_PICTURE_ID
    text = f"{make_mark(red.digest)} {TEXT} {make_mark(blue.digest)} 5"
    ids = llava.encode(text)
    assert [p.digest for p, _ in table.split_ids(ids) if p] == [red.digest, blue.digest]
    assert llava.decode(ids) == text
    assert llava.encode(f"{TEXT} 5") == [n for n in llava.encode(f"{TEXT} 5") if n < 1000]


def test_a_mark_of_no_picture_and_a_typed_placeholder_show_nothing(llava: EditableModel) -> None:
    table = table_of(llava)
    unknown = f"{make_mark('0' * 32)} {TEXT}"
    assert max(llava.encode(unknown)) < FIRST_PICTURE_ID
    red = table.add(RED)
    typed = f"{table.placeholder} {make_mark(red.digest)} {TEXT}"
    ids = llava.encode(typed)
    assert ids.count(table.placeholder_id) == 1
    assert sum(n >= FIRST_PICTURE_ID for n in ids) == len(red.ids)


def test_a_picture_is_found_by_its_file_when_a_text_names_it(llava: EditableModel) -> None:
    table, asked = table_of(llava), list[str]()

    def find(digest: str) -> bytes | None:
        asked.append(digest)
        return RED

    digest = PictureTable.add(table, BLUE).digest
    assert table.find(digest) is not None and not asked
    table.find_file = find
    found = table.find("f" * 32)
    assert found is not None and asked == ["f" * 32]


def test_the_oldest_pictures_are_forgotten_and_their_ids_refused(
    llava: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memory.model.pictures.MAX_KEPT_BYTES", 1)
    monkeypatch.setattr("memory.model.pictures.MAX_PICTURES", 2)
    table = table_of(llava)
    pictures = [table.add(draw_picture((n * 20, 50, 90))) for n in range(4)]
    assert table.find(pictures[3].digest) is pictures[3]
    assert table.find_by_id(pictures[2].first_id) is pictures[2]
    with pytest.raises(BadPicture, match="not kept so long"):
        table.see(pictures[2])
    table.find_file = lambda _digest: draw_picture((40, 50, 90))  # one that a home keeps
    assert table.see(pictures[2]).states.shape[0] == len(pictures[2].ids)
    table.find_file = lambda _digest: None
    with pytest.raises(BadPicture, match="not kept so long") as caught:
        table.find_by_id(pictures[0].first_id)
    assert caught.value.hint == "send it again"
    assert table.find(pictures[0].digest) is None
