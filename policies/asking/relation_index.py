"""The bank of relations as vectors: which of them a text is near, and how to ask for a fact."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from memory.facts import Fact
from memory.side.subject_matcher import normalize_text
from policies.asking.bare_wording import BareWording, reduce_statement
from policies.asking.relation_bank import Relation, mask_prompt, mask_statement, mask_subject
from policies.asking.relation_encoder import RelationEncoder

# A relation whose questions are so near to a fact is the fact's own: from the first similarity on,
# within the second of the best.
MIN_OWN_SIMILARITY, OWN_SPREAD = 0.45, 0.03
# The same of a relation whose statements are so near to a prompt, by their words alone.
MIN_STATED_SIMILARITY = 0.8
# Of the relations that have a target among their typical answers, those that a prompt is the
# nearest to are the fact's own ("it, the" midfielder), if their statements are so near at least.
MIN_TOLD_SIMILARITY, TOLD_SPREAD = 0.2, 0.02
CERTAIN_SIMILARITY = 0.9  # from which questions count such a relation as the fact's own, too
SAME_WORDING = 0.98  # similarity from which a statement is the prompt itself


class RelationIndex:
    """Vectors of the questions and statements of a bank's relations."""

    def __init__(self, encoder: RelationEncoder, bank: Sequence[Relation]) -> None:
        self.encoder = encoder
        self.names = tuple(relation.relation for relation in bank)
        self._questions = [question for relation in bank for question in relation.questions]
        self._vectors = encoder.encode_questions(list(map(mask_subject, self._questions)))
        owners = [n for n, relation in enumerate(bank) for _ in relation.questions]
        self._owners, self._count = torch.tensor(owners), len(bank)
        self._kinds = [relation.kind for relation in bank]
        self._answered: dict[str, set[int]] = {}  # relations by their typical answers
        for n, answer in ((n, a) for n, relation in enumerate(bank) for a in relation.answers):
            self._answered.setdefault(normalize_text(answer), set()).add(n)
        stated = [(n, s) for n, relation in enumerate(bank) for s in relation.statements]
        # Those that name the subject before the target, as a prompt does.
        stated = [(n, s) for n, s in stated if 0 <= s.find("{subject}") < s.find("{target}")]
        self._statements = [s.partition("{target}")[0].strip() for _, s in stated]
        self._statement_owners = torch.tensor([n for n, _ in stated])
        masked = [mask_statement(s).strip(" ,") for _, s in stated]
        self._bare: dict[int, set[BareWording]] = {}  # statements that tell no relation, by owner
        for (owner, _), statement in zip(stated, masked, strict=True):
            if (wording := reduce_statement(statement)) is not None:
                self._bare.setdefault(owner, set()).add(wording)
        self._statement_means = encoder.average(masked)
        self._statement_vectors = encoder.encode_sentences(masked)

    def encode_statements(self, fact: Fact) -> Tensor:
        """Return the vectors (n, width) of a fact's prompt and paraphrases, with its target."""
        prompts = mask_prompts(fact)
        return self.encoder.encode_facts(prompts, [fact.target] * len(prompts))

    def compare_relations(self, vectors: Tensor) -> Tensor:
        """Return the similarity (n, relations) of vectors to the nearest question of each."""
        return self._find_largest(vectors @ self._vectors.T, self._owners)

    def compare_statements(self, vectors: Tensor) -> Tensor:
        """Return the similarity (n, relations) of vectors to the nearest statement of each, up to
        its target."""
        return self._find_largest(vectors @ self._statement_vectors.T, self._statement_owners)

    def _compare_words(self, means: Tensor) -> Tensor:
        """Return the similarity (relations,) of the nearest of some means of words to the nearest
        statement of each."""
        found = means @ self._statement_means.T
        return self._find_largest(found, self._statement_owners).amax(0)

    def _find_largest(self, found: Tensor, owners: Tensor) -> Tensor:
        """Return the largest similarity (n, relations) to a relation's wordings."""
        least = found.new_full((len(found), self._count), -1.0)
        return least.scatter_reduce(1, owners.expand_as(found), found, "amax")

    def average_prompts(self, fact: Fact) -> Tensor:
        """Return means (n, width) of the words of a fact's prompt and paraphrases."""
        return self.encoder.average(mask_prompts(fact))

    def encode_prompts(self, fact: Fact) -> Tensor:
        """Return the vectors (n, width) of a fact's prompt and paraphrases, as sentences."""
        return self.encoder.encode_sentences(mask_prompts(fact))

    def find_stated_relations(
        self, prompts: Tensor, least: float = MIN_STATED_SIMILARITY
    ) -> Tensor:
        """Return which relations (relations,) a fact states, by the means of its prompts, whose
        similarity is to be `least`."""
        near = self._compare_words(prompts)
        return near >= max(least, float(near.max()) - OWN_SPREAD)

    def find_answered_relations(self, fact: Fact) -> Tensor:
        """Return which relations (relations,) a fact's target tells, also where its prompt tells
        little: those with this answer whose statements are the nearest."""
        told = torch.zeros(self._count, dtype=torch.bool)
        answered = sorted(self._answered.get(normalize_text(fact.target), ()))
        if answered:
            told[answered] = True
            near = self._compare_words(self.average_prompts(fact)).masked_fill(~told, -1.0)
            told = near >= max(MIN_TOLD_SIMILARITY, float(near.max()) - TOLD_SPREAD)
        return told

    def find_statements(self, fact: Fact, count: int) -> list[str]:
        """Return other prompts of a fact, from the statements of its relation, the nearest
        first."""
        near = self._compare_prompts(fact)
        told = self._find_told_relations(fact)
        usable = told[self._statement_owners] & (near < SAME_WORDING)
        order = near.masked_fill(~usable, -1.0).argsort(descending=True)[: int(usable.sum())]
        found = dict.fromkeys(self._statements[n] for n in order.tolist())
        return [prompt.replace("{subject}", "{}") for prompt in found][:count]

    def find_bare_statements(self, relations: Tensor) -> set[BareWording]:
        """Return the statements of some relations (relations,) that tell none ("it is in")."""
        chosen = relations.nonzero().flatten().tolist()
        return {wording for n in chosen for wording in self._bare.get(n, ())}

    def _compare_prompts(self, fact: Fact) -> Tensor:
        """Return the similarity (statements,) of the words of a fact's prompts."""
        return (self.average_prompts(fact) @ self._statement_means.T).amax(0)

    def _find_told_relations(self, fact: Fact) -> Tensor:
        """Return which relations (relations,) a fact tells.

        Words alone confuse relations ("writes in" a language, with a hand): it has to be the one
        that its target tells too, or the only one that is stated so in the very words.
        """
        stated = self.find_stated_relations(self.average_prompts(fact))
        told = stated & self.find_own_relations(self.encode_statements(fact))
        nearest = float(self._compare_prompts(fact).max())
        if not told.any() and nearest >= SAME_WORDING and int(stated.sum()) == 1:
            return stated
        return told

    def find_own_relations(self, statements: Tensor) -> Tensor:
        """Return which relations (relations,) are a fact's own, by its statements' vectors."""
        return self._find_near(self.compare_relations(statements))

    def find_own_statements(self, statements: Tensor) -> Tensor:
        """Return the same by the statements of the bank, in place of its questions."""
        return self._find_near(self.compare_statements(statements))

    @staticmethod
    def _find_near(similarities: Tensor) -> Tensor:
        near = similarities.amax(0)
        return near >= max(MIN_OWN_SIMILARITY, float(near.max()) - OWN_SPREAD)

    def find_questions(self, fact: Fact, count: int) -> list[str]:
        """Return questions of the bank that ask for a fact, the nearest first, then those of the
        relation that its target tells; none where no relation is near."""
        near = (self.encode_statements(fact) @ self._vectors.T).amax(0)
        told = self.find_answered_relations(fact)[self._owners]
        usable = (near >= MIN_OWN_SIMILARITY) | told
        near = near.masked_fill(~usable, -2.0)
        best = near.topk(min(count, len(near)))
        return [
            self._questions[n].replace("{subject}", fact.subject)
            for similarity, n in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if similarity >= -1
        ]

    def find_relation_questions(self, fact: Fact) -> list[str]:
        """Return all questions of the relation that a fact tells, the nearest first; none where
        the bank may not have it."""
        near = (self.encode_statements(fact) @ self._vectors.T).amax(0)
        told = self._find_told_relations(fact)[self._owners]
        order = near.masked_fill(~told, -1.0).argsort(descending=True)[: int(told.sum())]
        return [self._questions[n].replace("{subject}", fact.subject) for n in order.tolist()]

    def find_other_questions(self, fact: Fact, count: int) -> list[str]:
        """Return questions about a fact's subject that ask for something else: of relations of
        the same kind (a person's, a place's), each of another relation, the same at every call."""
        near = self.compare_relations(self.encode_statements(fact)).amax(0)
        own = (near >= MIN_OWN_SIMILARITY) | self.find_answered_relations(fact)
        kind = self._kinds[int(near.argmax())]
        others = [n for n in range(self._count) if not own[n]]
        first = dict(zip(reversed(self._owners.tolist()), reversed(self._questions), strict=True))
        alike = [n for n in others if self._kinds[n] == kind] if kind else []
        draw = random.Random(fact.id)
        pool = [n for n in alike or others if n in first]
        chosen = draw.sample(pool, min(count, len(pool)))
        return [first[n].replace("{subject}", fact.subject) for n in chosen]


def mask_prompts(fact: Fact) -> list[str]:
    """Write a fact's prompt and paraphrases with a pronoun for the subject, whatever its name."""
    names = sorted(fact.names, key=len, reverse=True)
    return [
        mask_prompt(prompt, next((name for name in names if name in prompt), fact.subject))
        for prompt in (fact.prompt, *fact.paraphrases)
    ]
