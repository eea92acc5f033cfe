"""Forms of a prompt that ask the same: without white space at its end, without line breaks within
its sentence, without the labels of "Q: … A:" around it, and without thanks behind its question.

A fact is learned on the plain form. So a prompt in another form is read in its plain ones, too, and
where a fact fires for one of these, the model goes on from that. A prompt for which nothing fires
stays as it is.
"""

import re
from collections.abc import Sequence

from memory.blanks import settle_blanks
from memory.side.prompt_states import read_states
from memory.side.side_memory import SideMemory

_QUESTION_LABEL = re.compile(r"(?:^|(?<=\n))[^\S\n]*(?:Q|Question|User)\s*[:\uff1a.)]\s*")
_ANSWER_LABEL = re.compile(r"(?:\s+|(?<=[?\uff1f]))(?:A|Answer|Assistant)\s*[:\uff1a]\s*$")
_THANKS = re.compile(
    r"(?<=[?\uff1f])\s*"
    r"(?:(?:(?:many )?thanks|thank you|thx)\b[^?\uff1f\n]{0,40}|(?:cheers|please)\W*)$",
    re.IGNORECASE,
)


def strip_labels(text: str) -> str:
    """Return a prompt without the labels of a question and its answer, or the thanks behind it, at
    its end."""
    label = _ANSWER_LABEL.search(text)
    if label is None:
        return _THANKS.sub("", text)
    before = text[: label.start()].rstrip()
    questions = list(_QUESTION_LABEL.finditer(before))
    if questions:
        before = before[: questions[-1].start()] + before[questions[-1].end() :]
    elif "\n" not in label[0] and not before.endswith(("?", "\uff1f")):
        return text  # "Vitamin A:"
    return _THANKS.sub("", before)


def list_forms(text: str) -> list[str]:
    """List the plainer forms of a prompt, the nearest first; none of a plain one."""
    bare = text.strip()
    plain = strip_labels(bare)
    forms = dict.fromkeys((bare, settle_blanks(bare), plain, settle_blanks(plain)))
    return [form for form in forms if form and form != text]


def choose_form(side: SideMemory, text: str) -> str:
    """Return the form of a prompt from which the model goes on: the first plainer one for which a
    fact fires, else the prompt itself."""
    forms = list_forms(text)
    if not forms or not (side.unnamed_facts or side.subject_matcher.may_name(text)):
        return text
    if side.is_chat(text):  # the template has white space of its own
        return text
    ids = side.model.encode(text)
    if side.reader is not None and side.find_asked(ids) is not None:
        # Words find the question behind its labels.
        forms = [form for form in forms if form in (text.strip(), settle_blanks(text))]
    for form in forms:
        if _fires(side, form, len(ids)):
            return form
    return text


def choose_prompt(side: SideMemory, ids: Sequence[int]) -> list[int]:
    """Return the token ids of a prompt's form from which the model goes on. A prompt that its text
    does not tell, such as one with special tokens within, stays as it is."""
    model = side.model
    text = model.decode(ids)
    if not list_forms(text) or model.encode(text) != list(ids):
        return list(ids)
    form = choose_form(side, text)
    return list(ids) if form == text else model.encode(form)


def _fires(side: SideMemory, text: str, max_tokens: int) -> bool:
    """Check that a fact fires for a prompt of at most `max_tokens`."""
    ids = side.model.encode(text)
    if not 0 < len(ids) <= max_tokens:
        return False
    reading = side.read_prompt(ids)
    if not reading.named and not side.unnamed_facts:
        return False
    states = read_states(side, ids)
    return bool(side.route_row(reading, states.key_outputs, states.inputs, states.outputs))
