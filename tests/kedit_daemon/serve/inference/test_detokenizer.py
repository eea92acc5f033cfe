from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kedit_daemon.serve.inference.detokenizer import Detokenizer

TOKENIZER = make_tokenizer()
TEXT = "Città di Köln 東京都 🇮🇹 is «Rome».\n"


def decode(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(ids), skip_special_tokens=True))


def encode(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return found


def spelled(ids: Sequence[int], stop: Sequence[str] = (), prompt: str = "It is") -> list[str]:
    """The pieces, the last one that of the end."""
    spelling = Detokenizer(decode, encode(prompt), stop)
    pieces = []
    for token in ids:
        pieces.append(spelling.add_token(token))
        if spelling.is_stopped:
            return pieces
    return [*pieces, spelling.flush()]


def test_characters_of_several_tokens_come_whole() -> None:
    ids = encode(TEXT)
    assert len(ids) > len(TEXT)
    pieces = spelled(ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 20


@pytest.mark.parametrize(
    ("prompt", "dropped"), [("It is", False), ("It is ", True), ("It\n", True)]
)
def test_a_first_blank_is_dropped(prompt: str, dropped: bool) -> None:
    for text in (" Rome and", "Rome and", "  Rome"):
        spelling = Detokenizer(decode, encode(prompt), ())
        assert spelling.is_behind_blank is dropped
        if dropped:
            spelling.drop_first_blank()
        said = "".join(map(spelling.add_token, encode(text))) + spelling.flush()
        assert said == (text.lstrip() if dropped else text)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
def test_whatever_the_tokens_all_pieces_are_what_decoding_at_once_gives(ids: list[int]) -> None:
    assert "".join(spelled(ids)) == decode(ids)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab c", max_size=30),
    stop=st.lists(st.text("ab c", min_size=1, max_size=4), max_size=3),
)
def test_a_text_ends_before_the_first_stop_text(text: str, stop: list[str]) -> None:
    pieces = spelled([token for char in text for token in encode(char)], stop)
    # A stop text counts as soon as it is whole, wherever another one has begun before it.
    ends = [at + len(s) for s in stop if (at := text.find(s)) >= 0]
    seen = text[: min(ends, default=len(text))]
    cut = min((at for s in stop if (at := seen.find(s)) >= 0), default=len(text))
    assert "".join(pieces) == text[:cut]
    for n in range(len(pieces)):
        assert text[:cut].startswith("".join(pieces[:n]))


def test_a_stop_text_over_several_tokens_is_held_back_and_given_when_it_is_none() -> None:
    ids = [token for word in (" Rome", " is", " Oslo", ".") for token in encode(word)]
    text = decode(ids)
    assert "".join(spelled(ids, ["Rome is O"])) == " "
    assert "".join(spelled(ids, ["Rome is not"])) == text
    assert "".join(spelled(ids, [". And"])) == text
    assert "".join(spelled(ids, [""])) == text


def test_a_stop_text_that_comes_only_with_the_rest_stops() -> None:
    broken = encode("é")[:1]
    spelling = Detokenizer(decode, [], ["\ufffd"])
    assert spelling.add_token(broken[0]) == ""
    assert not spelling.is_stopped
    assert (spelling.flush(), spelling.is_stopped) == ("", True)


def test_half_a_character_at_the_end_is_what_decoding_at_once_gives() -> None:
    ids = [*encode("Rome"), encode("é")[0]]
    assert "".join(spelled(ids)) == decode(ids) == "Rome\ufffd"


def test_a_character_that_the_prompt_began_is_told_whole() -> None:
    first, second = encode("é")
    spelling = Detokenizer(decode, [*encode("caf"), first], ())
    assert spelling.add_token(second) == "é"


@pytest.mark.parametrize("prompt", ["The seat is", "is"])
def test_the_space_before_the_first_word_is_not_lost(prompt: str) -> None:
    words = {"▁The": 0, "▁seat": 1, "▁is": 2, "▁Rome": 3, "▁": 4, "<unk>": 5}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    ids = tokenizer(prompt)["input_ids"]
    spelling = Detokenizer(lambda some: str(tokenizer.decode(some)), ids, ())
    assert [spelling.add_token(3), spelling.add_token(2), spelling.add_token(3)] == [
        " Rome",
        " is",
        " Rome",
    ]


def test_a_long_text_is_not_decoded_again_and_again() -> None:
    longest = 0

    def watched(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    spelling = Detokenizer(watched, encode(TEXT * 10), ())
    for token in encode("The seat is Rome. " * 50):
        spelling.add_token(token)
    assert longest < 12
