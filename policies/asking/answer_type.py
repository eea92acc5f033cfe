"""Answers that a question cannot have: a date where it asks who, a name where it asks when."""

import re

_NUMBER_WORDS = (
    "zero|none|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six"
    "|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty(?:-\\w+)?|dozen|hundred|thousand"
    "|million|billion|half|twice|once"
)
_TIME_WORDS = (
    "january|february|march|april|may|june|july|august|september|october|november|december|monday"
    "|tuesday|wednesday|thursday|friday|saturday|sunday|spring|summer|autumn|winter|morning|noon"
    "|afternoon|evening|night|midnight|today|tomorrow|century|daily|weekly|monthly|yearly|never|always"
)
TELLS_TIME = re.compile(rf"\d|\b(?:{_NUMBER_WORDS}|{_TIME_WORDS})\b", re.IGNORECASE)
TELLS_AMOUNT = re.compile(rf"\d|\b(?:{_NUMBER_WORDS}|free|all|no)\b", re.IGNORECASE)
QUESTION_WORD = re.compile(r"\b(?:who(?:m|se)?|what|which|where|when|why|how)\b", re.IGNORECASE)
ASKS_TIME = re.compile(r"when|(?:what|which) (?:year|date|day|month|time)\b", re.IGNORECASE)
ASKS_AMOUNT = re.compile(
    r"how (?:many|much|old|tall|long|far|often|late|heavy|high)\b", re.IGNORECASE
)
ASKS_PERSON = re.compile(r"who", re.IGNORECASE)
HAS_LETTER = re.compile(r"[^\W\d_]")


def can_answer(question: str, target: str) -> bool:
    """Check that a target is of the type that a question's first question word asks for, where it
    names one: "which city did it move to when …" asks for no time."""
    asked = QUESTION_WORD.search(question)
    if asked is None:
        return True
    if ASKS_TIME.match(question, asked.start()):
        return bool(TELLS_TIME.search(target))
    if ASKS_AMOUNT.match(question, asked.start()):
        return bool(TELLS_AMOUNT.search(target) or TELLS_TIME.search(target))
    if ASKS_PERSON.match(question, asked.start()):
        return bool(HAS_LETTER.search(target))
    return True
