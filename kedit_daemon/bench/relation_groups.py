"""Groups of records that ask for one relation, told by their wordings."""

from collections.abc import Sequence

from kedit_daemon.shipped import RELATIONS
from memory.facts import Fact
from policies.asking.relation_bank import mask_prompt, mask_statement, read_bank


def group_by_relation(wordings: Sequence[tuple[Fact, Sequence[str]]]) -> list[str]:
    """Return a name for the relation of each fact, given with its questions. Facts share it whose
    prompts or questions are the same but for the subject, or whose prompts PARAREL has in one
    relation."""
    joined = dict[str, str]()

    def find(name: str) -> str:
        while (parent := joined.setdefault(name, name)) != name:
            name = parent
        return name

    named = _name_statements()
    for fact, questions in wordings:
        prompt = mask_prompt(fact.prompt, fact.subject)
        others = [mask_prompt(question, fact.subject) for question in questions]
        if prompt in named:
            others.append(f"relation: {named[prompt]}")
        for other in others:
            joined[find(other)] = find(prompt)
    return [find(mask_prompt(fact.prompt, fact.subject)) for fact, _ in wordings]


def _name_statements() -> dict[str, str]:
    """Return the names of PARAREL's relations by their statements, with a pronoun for the
    subject."""
    return {
        mask_statement(statement).strip(" ,"): relation.relation
        for relation in read_bank(RELATIONS[1:])
        for statement in relation.statements
    }
