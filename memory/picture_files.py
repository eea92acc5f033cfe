"""Files of pictures: checked before anything else reads them, and kept by their digest."""

import base64
import binascii
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from memory.errors import BadPicture
from memory.files import write_atomic
from memory.picture_marks import make_digest

if TYPE_CHECKING:  # a command that reads no picture does not wait for it
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
MAX_PICTURE_BYTES = 10_485_760
MAX_PIXELS = 40_000_000  # a file of some kilobytes may unfold into gigabytes
DATA_URL_MARK = "data:"
HINT_KINDS = "give a PNG, JPEG, WebP, GIF or BMP file"


def open_picture(data: bytes) -> "Image":
    """Decode a picture into RGB. Raises BadPicture: too large, cut off, or no picture."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if len(data) > MAX_PICTURE_BYTES:
        raise BadPicture(
            f"the picture has {len(data)} bytes, more than {MAX_PICTURE_BYTES}",
            hint="save it smaller: models look at some hundred pixels a side",
        )
    try:
        with warnings.catch_warnings():  # Pillow warns of what is refused here
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                wide, high = image.size
                if wide * high > MAX_PIXELS:
                    raise BadPicture(
                        f"the picture has {wide} x {high} pixels, more than {MAX_PIXELS} in all",
                        hint="save it smaller: models look at some hundred pixels a side",
                    )
                return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise BadPicture("the file is not a picture", hint=HINT_KINDS) from error
    except BadPicture:
        raise
    # Broken files lead Pillow to errors of many kinds.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        problem = f"the picture is broken: {error}"
        raise BadPicture(problem, hint="save it anew, whole") from error


def check_picture(data: bytes) -> str:
    """Check that a file is a whole picture, and return its digest. Raises BadPicture."""
    open_picture(data)
    return make_digest(data)


def read_data_url(url: str) -> bytes:
    """Read the bytes of a data URL. Raises BadPicture."""
    head, comma, body = url.partition(",")
    if not comma or not head.startswith(DATA_URL_MARK) or not head.endswith(";base64"):
        raise BadPicture(
            "the picture's URL is not one of data in base64",
            hint="write data:image/png;base64,…",
        )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadPicture(
            f"the data of the picture's URL are not base64: {error}",
            hint="write data:image/png;base64,… without blanks",
        ) from error


def make_data_url(data: bytes) -> str:
    """Write the bytes of a picture as a data URL."""
    return f"data:image/*;base64,{base64.b64encode(data).decode()}"


def keep_picture(folder: Path, data: bytes) -> str:
    """Keep a picture in a folder, by its digest, which is returned. Raises BadPicture."""
    digest = check_picture(data)
    if read_kept(folder, digest) is None:
        folder.mkdir(exist_ok=True)
        write_atomic(folder / digest, data)
    return digest


def read_kept(folder: Path, digest: str) -> bytes | None:
    """Read a picture that a folder keeps; None where it has none, or another in its place."""
    try:
        data = (folder / digest).read_bytes()
    except FileNotFoundError:
        return None
    return data if make_digest(data) == digest else None
