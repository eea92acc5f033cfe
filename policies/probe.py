"""Probes of an edit: the model's answers before and after, compared as people would."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from memory.facts import Fact
from memory.joins import is_unspaced
from memory.model.editable import EditableModel
from memory.model.generate import Overlay, generate_answers
from memory.side.subject_matcher import normalize_text
from policies.prompts import MAX_PARAPHRASES

MAX_NEIGHBOURS = 3


def normalize_answer(text: str) -> str:
    """Return lower case, no punctuation or articles, single spaces: SQuAD's exact-match form."""
    words = normalize_text(text).split()
    short = " ".join(word for word in words if word not in ("a", "an", "the"))
    return short or text.strip().casefold()  # an answer may be "A", or "+"


def is_same_answer(answer: str, target: str) -> bool:
    """Check that answer and target match exactly after normalizing."""
    return normalize_answer(answer) == normalize_answer(target)


def is_right_answer(answer: str, fact: Fact) -> bool:
    """Check that an answer matches one of the fact's targets after normalizing."""
    return any(is_same_answer(answer, target) for target in fact.targets)


def says_answers(reply: str, wanted: Sequence[str]) -> bool:
    """Check that a reply has all wanted answers, each as whole words where words stand apart."""
    return all(_says_answer(reply, answer) for answer in wanted)


def _says_answer(reply: str, answer: str) -> bool:
    text = normalize_text(answer)
    if not text:  # "+"
        return answer.strip() in reply
    said = f" {normalize_text(reply)} "
    return (text if is_unspaced(answer) else f" {text} ") in said


@dataclass(frozen=True)
class Probe:
    """Result of an edit; counts are of the prompts that were asked."""

    answer: str
    right: bool
    paraphrases: int
    paraphrases_right: int
    neighbours: int
    neighbours_unchanged: int

    def as_dict(self) -> dict[str, object]:
        """Return the result as JSON-ready values."""
        return asdict(self)


def list_probe_prompts(fact: Fact) -> list[str]:
    """List the prompts of a probe: the fact's own, paraphrases, neighbours, in this order."""
    return [
        fact.question,
        *fact.filled_paraphrases[:MAX_PARAPHRASES],
        *(n.prompt for n in fact.neighbours[:MAX_NEIGHBOURS]),
    ]


def count_answer_tokens(model: EditableModel, facts: Sequence[Fact]) -> int:
    """Return the tokens to allow an answer: the longest target and a few to stop in."""
    stated = ((f.question, target, f.join) for f in facts for target in f.targets)
    return max(len(model.encode_target(*one)) for one in stated) + 4


def answer_probes(
    model: EditableModel, facts: Sequence[Fact], overlay: Overlay | None = None
) -> dict[str, list[str]]:
    """Return the model's answers to every fact's probe prompts, by fact id."""
    if not facts:
        return {}
    asked = [(fact.id, prompt) for fact in facts for prompt in list_probe_prompts(fact)]
    max_tokens = count_answer_tokens(model, facts)
    answers = generate_answers(model, [p for _, p in asked], max_tokens, overlay)
    result: dict[str, list[str]] = {fact.id: [] for fact in facts}
    for (fact_id, _), answer in zip(asked, answers, strict=True):
        result[fact_id].append(answer)
    return result


def compare_answers(fact: Fact, before: Sequence[str], after: Sequence[str]) -> Probe:
    """Compare the unedited and the edited model's answers to `list_probe_prompts(fact)`."""
    rephrased = len(fact.filled_paraphrases[:MAX_PARAPHRASES])
    after_rephrased, after_near = after[1 : 1 + rephrased], after[1 + rephrased :]
    pairs = zip(after_near, before[1 + rephrased :], strict=True)
    return Probe(
        answer=after[0],
        right=is_right_answer(after[0], fact),
        paraphrases=rephrased,
        paraphrases_right=sum(is_right_answer(a, fact) for a in after_rephrased),
        neighbours=len(after_near),
        neighbours_unchanged=sum(a == b for a, b in pairs),
    )
