"""Files of pictures: what is refused, and what is kept."""

import io
from pathlib import Path

import pytest
from PIL import Image
from tiny_vision_models import draw_picture

from memory.errors import BadPicture
from memory.picture_files import (
    MAX_PICTURE_BYTES,
    check_picture,
    keep_picture,
    make_data_url,
    open_picture,
    read_data_url,
    read_kept,
)
from memory.picture_marks import find_digest, join_mark, make_digest, remove_marks
from memory.picture_variants import vary_picture

RED = draw_picture()


def make_huge() -> bytes:
    made = io.BytesIO()
    Image.new("L", (9_000, 9_000)).save(made, "PNG")
    return made.getvalue()


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "not a picture"),
        (b"%PDF-1.7 text", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (RED[:60], "broken"),
        (RED[:-30], "broken"),
        (make_huge(), "9000 x 9000 pixels"),
        (b"\x89PNG" + bytes(MAX_PICTURE_BYTES), "more than 10485760"),
    ],
)
def test_what_is_no_whole_picture_is_refused(data: bytes, cause: str) -> None:
    with pytest.raises(BadPicture, match=cause) as caught:
        check_picture(data)
    assert caught.value.hint


def test_a_picture_is_opened_upright_and_in_colours() -> None:
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera that was held upright
    Image.new("RGBA", (8, 4), (255, 0, 0, 10)).convert("RGB").save(turned, "JPEG", exif=exif)
    opened = open_picture(turned.getvalue())
    assert (opened.size, opened.mode) == ((4, 8), "RGB")


def test_data_urls_are_read_and_bad_ones_told() -> None:
    assert read_data_url(make_data_url(RED)) == RED
    for bad, cause in (
        ("https://example.org/tower.png", "not one of data in base64"),
        ("data:image/png,abc", "not one of data in base64"),
        ("data:image/png;base64,a b", "not base64"),
    ):
        with pytest.raises(BadPicture, match=cause) as caught:
            read_data_url(bad)
        assert "data:image/png;base64" in caught.value.hint


def test_a_kept_picture_is_found_by_its_digest_alone(tmp_path: Path) -> None:
    digest = keep_picture(tmp_path / "pictures", RED)
    assert digest == make_digest(RED) == keep_picture(tmp_path / "pictures", RED)
    assert read_kept(tmp_path / "pictures", digest) == RED
    assert read_kept(tmp_path / "pictures", "0" * 32) is None
    (tmp_path / "pictures" / digest).write_bytes(RED[:-1])
    assert read_kept(tmp_path / "pictures", digest) is None


def test_marks_stand_in_texts() -> None:
    digest = make_digest(RED)
    text = join_mark(digest, "What is it?")
    assert text == f"[image {digest}] What is it?"
    assert (find_digest(text), find_digest("What?")) == (digest, None)
    assert remove_marks(f"See {text}") == "See What is it?"


def test_variants_are_other_pictures_of_the_same_size() -> None:
    made = list(vary_picture(RED))
    assert len({*made, RED}) == 9
    assert {open_picture(one).size for one in made} == {(16, 16)}
    assert made == list(vary_picture(RED))
