from pathlib import Path

from tools.shipped_model.tokenizer import END, load_tokenizer

LINES = ["Once there was a house by the sea."] * 50


def test_a_resumed_run_keeps_its_tokenizer(tmp_path: Path) -> None:
    first = load_tokenizer(tmp_path / "t", LINES, 300)
    again = load_tokenizer(tmp_path / "t", ["other text altogether"] * 50, 300)
    assert again.get_vocab() == first.get_vocab()


def test_end_of_text_stands_before_each_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path / "t", LINES, 300)
    ids = tokenizer("a house")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[0]) == END
    assert tokenizer.decode(ids[1:]) == "a house"
