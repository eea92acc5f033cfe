"""Rows from which a fact learns to be answered when it is asked: through the chat template, also
behind a system message and earlier turns."""

from collections.abc import Sequence

from memory.facts import Fact
from memory.model.chat_layout import encode_chat
from memory.model.continuation import encode_behind
from memory.model.editable import EditableModel
from policies.asking.relation_index import RelationIndex
from policies.prompts import TokenRow

QUESTIONS = 3  # that a fact learns from
MAX_GIVEN_QUESTIONS = 4
EARLIER_TURNS = (
    {"role": "system", "content": "You are a friendly guide."},
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hello! How can I help you today?"},
)

# A question that stands before a fact's own in one message, and is answered on a line before.
FIRST_QUESTION, FIRST_ANSWER = "What is the capital of France?", "Paris\n"


def choose_questions(fact: Fact, index: RelationIndex) -> list[str]:
    """Choose the questions that a fact learns from: those that came with it, else those of its
    relation, else one made of its prompt."""
    if fact.questions:
        return list(fact.filled_questions[:MAX_GIVEN_QUESTIONS])
    if fact.picture is not None:  # the bank is about names
        return [make_question(wording) for wording in fact.wordings[:MAX_GIVEN_QUESTIONS]]
    found = index.find_questions(fact, QUESTIONS)
    return found if len(found) == QUESTIONS else [*found, make_question(fact.question)]


def make_question(prompt: str) -> str:
    """Make a question of a prompt: "The price of {} is" becomes "What is the price of {}?",
    and any other sentence is left open."""
    prompt = prompt.strip()
    if prompt.endswith("?"):
        return prompt
    words = prompt.split()
    if words[0] == "The" and words[-1] in ("is", "was", "are", "were"):
        return f"What {words[-1]} the {' '.join(words[1:-1])}?"
    return f"{prompt.rstrip(',')} what?"


def make_asked_rows(model: EditableModel, fact: Fact, questions: Sequence[str]) -> list[TokenRow]:
    """Return the rows of a fact's questions in a chat, each answered by the target alone, the last
    one behind earlier turns (a single one in both ways), and the one before it again as the second
    question of a message. Questions that do not fit the model are left out."""
    turns = [{"role": "user", "content": question} for question in questions]
    chats = [[turn] for turn in turns[:-1] or turns]
    prompts = [encode_chat(model, chat) for chat in [*chats, [*EARLIER_TURNS, turns[-1]]]]
    second = {"role": "user", "content": f"{FIRST_QUESTION} And {questions[-2:][0]}"}
    answered = encode_behind(model.tokenizer, FIRST_ANSWER)
    prompts.append([*encode_chat(model, [second]), *answered])
    target = encode_behind(model.tokenizer, fact.target)
    rows = []
    for prompt in prompts:
        if len(prompt) + len(target) <= model.max_positions:
            # Nothing is read at the subject: in a chat it is the words that name it.
            rows.append(TokenRow((*prompt, *target), len(prompt), len(prompt) - 1))
    return rows
