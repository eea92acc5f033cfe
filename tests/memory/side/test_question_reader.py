import pytest

from memory.model.chat_layout import ChatLayout
from memory.side.question_reader import AskedQuestion, find_question

LAYOUT = ChatLayout("</s>\n<s>user\n", "</s>\n<s>assistant\n")
CHAT = "<s>system\nBe kind.</s>\n<s>user\nWhere is Oslo?</s>\n<s>assistant\n"


def test_a_users_last_turn_is_a_question_whatever_its_form() -> None:
    assert find_question(CHAT, LAYOUT) == AskedQuestion(
        "Where is Oslo?", "<s>system\nBe kind.", is_chat=True
    )
    told = find_question(CHAT.replace("Where is Oslo?", "tell me where Oslo is"), LAYOUT)
    assert told is not None and told.question == "tell me where Oslo is"


def test_a_reply_that_has_begun_is_a_sentence_that_goes_on() -> None:
    assert find_question(CHAT + "Oslo is in", LAYOUT) is None


@pytest.mark.parametrize(
    ("text", "question", "history"),
    [
        ("Where is Oslo?", "Where is Oslo?", ""),
        ("Where is Oslo? ", "Where is Oslo?", ""),
        ("Q: Where is Oslo?\nA:", "Where is Oslo?", ""),
        ("Question: Where is Oslo?\n\nAnswer:", "Where is Oslo?", ""),
        ("It rained.\nWhere is Oslo?\n", "Where is Oslo?", "It rained."),
        ("User: Where is Oslo?\n\nAssistant:", "Where is Oslo?", ""),
    ],
)
@pytest.mark.parametrize("layout", [None, LAYOUT])
def test_a_text_may_end_in_a_question(
    text: str, question: str, history: str, layout: ChatLayout | None
) -> None:
    assert find_question(text, layout) == AskedQuestion(question, history, is_chat=False)


@pytest.mark.parametrize("text", ["Oslo is in", "Where is Oslo? It is in", "", "Is it? No."])
def test_a_sentence_that_goes_on_asks_nothing(text: str) -> None:
    assert find_question(text, LAYOUT) is None
