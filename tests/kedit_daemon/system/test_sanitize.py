import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedit_daemon.system.sanitize import REPLACEMENT, clean_text, clip_text


@pytest.mark.parametrize(
    "hostile",
    [
        "\x1b[2J",
        "\x1b]0;title\x07",
        "\x9b31m",
        "a\rb",
        "a\nb",
        "a\tb",
        "\x7f",
        "user\u202etxt.exe",
        "\u2066x\u2069",
        "\u200f",
        "\u061c",
        "a\u2028b",
        "\ud800",
        "\ufeff",
        "\U000e0041",
    ],
)
def test_what_acts_on_a_terminal_is_replaced(hostile: str) -> None:
    shown = clean_text(hostile)
    assert REPLACEMENT in shown
    assert len(shown) == len(hostile)
    shown.encode()


@pytest.mark.parametrize(
    "honest",
    [
        "Lake Eyre lies in Australia",
        "Прага, 東京, القاهرة, תל אביב",
        "नमस्ते",
        "👩\u200d🔬",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "°→…",
    ],
)
def test_the_world_s_writing_stays(honest: str) -> None:
    assert clean_text(honest) == honest


def test_a_block_keeps_its_lines() -> None:
    assert clean_text("a\n\tb\x1b", lines=True) == f"a\n\tb{REPLACEMENT}"


def test_anything_can_be_shown() -> None:
    assert clean_text(None) == "None"
    assert clean_text(7) == "7"


def test_long_text_is_clipped_to_the_width() -> None:
    assert clip_text("abcdef", 6) == "abcdef"
    assert clip_text("abcdefg", 6) == "abcde…"


@given(st.text(alphabet=st.characters()))
def test_no_control_character_comes_through(text: str) -> None:
    shown = clean_text(text)
    assert all(unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in shown)
    assert clean_text(shown) == shown
