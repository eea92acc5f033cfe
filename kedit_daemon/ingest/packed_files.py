"""Unpacks gzip, xz and zip files in memory, within bounds, and names files of other kinds."""

import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from kedit_daemon.ingest.field_types import quote_value
from kedit_daemon.ingest.json_syntax import UnreadableText
from kedit_daemon.ingest.unfinished_names import is_unfinished

MAX_RATIO = 100
MAX_FILES = 100
FREE_BYTES = 1 << 20  # whatever the ratio
XZ_MEMORY_BYTES = 100 << 20  # xz -9 needs 65 MiB
CHUNK_BYTES = 65_536
GZIP, XZ, ZIP = "gzip", "xz", "zip"
PACKINGS = {b"\x1f\x8b": GZIP, b"\xfd7zXZ\0": XZ, b"PK\x03\x04": ZIP, b"PK\x05\x06": ZIP}
PACKED_SUFFIXES = (".gz", ".xz")
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile bounds only these
REPACK = "pack it with gzip, xz or zip"
RESAVE = "save it as CSV or JSON Lines"
OTHER_KINDS = (
    (re.compile(rb"BZh\d1AY&SY"), "is packed with bzip2", REPACK),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "is packed with zstd", REPACK),
    (re.compile(rb"7z\xbc\xaf\x27\x1c"), "is a 7z archive", REPACK),
    (re.compile(rb"Rar!\x1a\x07"), "is a RAR archive", REPACK),
    (re.compile(rb".{257}ustar", re.DOTALL), "is a tar archive", "pack the files as a zip"),
    (re.compile(rb"\xd0\xcf\x11\xe0\xa1\xb1"), "is an old Office document", RESAVE),
    (re.compile(rb"SQLite format 3\0"), "is an SQLite database", RESAVE),
    (re.compile(rb"ARROW1\0"), "is an Arrow file", RESAVE),
    (re.compile(rb"%PDF-"), "is a PDF", RESAVE),
    (
        re.compile(rb"\x80[\x02-\x05][\x95\]}(c]"),
        "is a dump of Python objects, which may hold code",
        RESAVE,
    ),
)
OFFICE_FILES = {"[Content_Types].xml", "mimetype"}


def find_packing(data: bytes) -> str | None:
    """Find by its first bytes how a file is packed."""
    return next((kind for start, kind in PACKINGS.items() if data.startswith(start)), None)


def unpack_files(
    data: bytes, name: str, max_bytes: int
) -> Iterator[tuple[str, bytes | UnreadableText]]:
    """Yield the name and content of each file that a file packs; itself if it is not packed.

    No more than `max_bytes` are unpacked in all. A content that cannot be had is its problem.
    """
    packing = find_packing(data)
    limit = min(max_bytes, max(FREE_BYTES, MAX_RATIO * len(data)))
    if packing == ZIP:
        yield from _unzip(data, limit)
    elif packing is None:
        yield name, _check_kind(data)
    else:
        inner = name[:-3] if name.lower().endswith(PACKED_SUFFIXES) else name
        yield inner, _unpack_stream(data, packing, limit)


def pack_files(packing: str, files: Mapping[str, bytes]) -> bytes:
    """Pack files again in the way in which they came."""
    if packing == ZIP:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
        return packed.getvalue()
    data = b"".join(files.values())
    return gzip.compress(data, mtime=0) if packing == GZIP else lzma.compress(data)


def _too_large_error(limit: int) -> UnreadableText:
    return UnreadableText(f"unpacks to more than {limit} bytes", "split it into smaller files")


def _broken_error(packing: str) -> UnreadableText:
    return UnreadableText(f"broken {packing} file", "pack it again, and submit the whole file")


def _check_kind(data: bytes) -> bytes | UnreadableText:
    """Return the content, or its problem if it is no text that can hold facts."""
    for start, problem, remedy in OTHER_KINDS:
        if start.match(data):
            return UnreadableText(f"the file {problem}", remedy)
    return data


def _check_unpacked(data: bytes, limit: int) -> bytes | UnreadableText:
    if len(data) > limit:
        return _too_large_error(limit)
    if find_packing(data):
        return UnreadableText("the file is packed twice", "pack it once")
    return _check_kind(data)


def _unpack_stream(data: bytes, packing: str, limit: int) -> bytes | UnreadableText:
    try:
        if packing == GZIP:
            with gzip.open(io.BytesIO(data)) as stream:
                return _check_unpacked(stream.read(limit + 1), limit)
        return _check_unpacked(_unpack_xz(data, limit), limit)
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        return _broken_error(packing)


def _unpack_xz(data: bytes, limit: int) -> bytes:
    """Unpack one stream after the other, up to a byte more than the limit."""
    parts, total = list[bytes](), 0
    while data and total <= limit:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY_BYTES)
        while not decoder.eof and total <= limit:
            if not data and decoder.needs_input:
                raise EOFError
            part = decoder.decompress(data, min(CHUNK_BYTES, limit + 1 - total))
            data = b""
            parts.append(part)
            total += len(part)
        data = decoder.unused_data.lstrip(b"\0")  # streams are padded
    return b"".join(parts)


def _unzip(data: bytes, limit: int) -> Iterator[tuple[str, bytes | UnreadableText]]:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        yield "", _broken_error(ZIP)
        return
    infos = [info for info in archive.infolist() if _is_wanted(info)]
    if OFFICE_FILES & {info.filename for info in infos}:
        yield "", UnreadableText("the file is an Office document", RESAVE)
        return
    if len(infos) > MAX_FILES:
        yield "", UnreadableText(f"more than {MAX_FILES} files in the archive", "pack fewer files")
        return
    left = limit
    for info in infos:
        content = _read_zipped(archive, info, left)
        if isinstance(content, bytes):
            left -= len(content)
        yield info.filename, content


def _is_wanted(info: zipfile.ZipInfo) -> bool:
    """Check that a file was meant to be packed: macOS and editors leave others beside it."""
    left_behind = info.filename.startswith("__MACOSX/")
    return not (
        info.is_dir() or left_behind or is_unfinished(PurePosixPath(info.filename).name, ())
    )


def _read_zipped(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int
) -> bytes | UnreadableText:
    if "/" in info.filename or "\\" in info.orig_filename:
        remedy = "pack the files themselves, without folders"
        return UnreadableText(f"{quote_value(info.filename)} lies in a folder", remedy)
    if info.flag_bits & 1:
        return UnreadableText("the file is encrypted", "pack it without a password")
    if info.compress_type not in ZIP_METHODS:
        return UnreadableText("the file is packed by a rare method", "pack it with deflate")
    try:
        with archive.open(info) as file:
            return _check_unpacked(file.read(limit + 1), limit)
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error, ValueError, NotImplementedError):
        return _broken_error(ZIP)
