"""Bytes as people's tools save them."""

import pytest

from kedit_daemon.ingest.file_text import decode_text
from kedit_daemon.ingest.record_splitter import UnreadableText

TEXT = '{"subject": "Čad 😀"}\n'


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_encoding_of_unicode_is_read(codec: str, mark: str) -> None:
    assert decode_text((mark + TEXT).encode(codec)) == TEXT


def test_two_byte_order_marks_are_none_of_the_text() -> None:
    assert decode_text(("\ufeff\ufeff" + TEXT).encode()) == TEXT


@pytest.mark.parametrize("codec", ["utf-32", "utf-32-be"])
def test_utf32_is_named(codec: str) -> None:
    with pytest.raises(UnreadableText, match="UTF-32") as caught:
        decode_text(("\ufeff" * (codec == "utf-32-be") + TEXT).encode(codec))
    assert "UTF-8" in caught.value.remedy


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_broken_utf16_is_marked_where_it_stands(codec: str) -> None:
    whole = (TEXT + "\ud83d\n" + TEXT).encode(codec, "surrogatepass")
    assert decode_text(whole) == TEXT + "\udcff\n" + TEXT
    assert decode_text(TEXT.encode(codec) + b"x") == TEXT + "\udcff"


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"a\rb\r", "a\nb\n"), (b"a\r\nb\r\n", "a\r\nb\r\n"), (b"a\rb\nc", "a\rb\nc"), (b"a", "a")],
)
def test_carriage_returns_alone_end_lines(data: bytes, text: str) -> None:
    assert decode_text(data) == text


def test_bytes_of_no_encoding_stay_distinct() -> None:
    assert decode_text(b"a\xffb\n").encode("utf-8", "surrogateescape") == b"a\xffb\n"
