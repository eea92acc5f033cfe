"""Decodes a file's bytes into text: encodings, byte order marks and line ends."""

import codecs
import re

from kedit_daemon.ingest.json_syntax import UnreadableText

UTF16_CODECS = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
UTF32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
# Two ASCII characters: without a mark, a text of facts shows its encoding by them.
UTF16_OPENINGS = {
    "utf-16-le": re.compile(rb"[\t\n\r -~]\0[\t\n\r -~]\0"),
    "utf-16-be": re.compile(rb"\0[\t\n\r -~]\0[\t\n\r -~]"),
}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
INVALID_MARK = "\udcff"  # stands for what is no character, so that only its record is lost
BYTE_ORDER_MARK = "\ufeff"


def decode_text(data: bytes) -> str:
    """Decode UTF-8 or UTF-16, with or without a byte order mark; every line ends with a newline.

    Bytes that are no text become lone surrogates. Raises UnreadableText for another encoding.
    """
    if data.startswith(UTF32_MARKS):
        raise UnreadableText("the file is UTF-32", "save it as UTF-8")
    codec = _find_utf16_codec(data)
    if codec is None:
        text = data.decode("utf-8", "surrogateescape")
    else:
        text = data[: len(data) // 2 * 2].decode(codec, "surrogatepass")
        text = LONE_SURROGATE.sub(INVALID_MARK, text) + INVALID_MARK * (len(data) % 2)
    text = text.lstrip(BYTE_ORDER_MARK)
    return text if "\n" in text else text.replace("\r", "\n")


def _find_utf16_codec(data: bytes) -> str | None:
    if codec := UTF16_CODECS.get(data[:2]):
        return codec
    return next((name for name, start in UTF16_OPENINGS.items() if start.match(data)), None)
