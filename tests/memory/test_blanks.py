import pytest

from memory.blanks import settle_blanks


@pytest.mark.parametrize(
    ("text", "settled"),
    [
        ("The capital of {} is", "The capital of {} is"),
        ("  The capital of {} is \n", "The capital of {} is"),
        ("The  capital\tof\u00a0{} is", "The capital of {} is"),
        ("The capital of\n{} is", "The capital of {} is"),
        ("The capital of \r\n  {} is", "The capital of {} is"),
        ("The capital of\u2028{} is", "The capital of {} is"),
        ("法国的\n首都是", "法国的首都是"),
        ("Anglo-\nSaxon", "Anglo-Saxon"),
        ("It rained.\nThe capital of {} is", "It rained.\nThe capital of {} is"),
        ("Where is {}?\nIt is in", "Where is {}?\nIt is in"),
        ("Q: {} is in\nA:", "Q: {} is in\nA:"),
        ("A title\n\nThe capital of {} is", "A title\n\nThe capital of {} is"),
        ("1. Lima\n2. {} is in", "1. Lima\n2. {} is in"),
        (" \n", ""),
    ],
)
def test_white_space_is_put_in_order(text: str, settled: str) -> None:
    assert settle_blanks(text) == settled
    assert settle_blanks(settled) == settled
