"""The bank of relations as vectors: which of them a text is near, and how to ask for a fact."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memory.facts import Fact
from policies.asking.relation_bank import Relation, mask_prompt, mask_subject
from policies.asking.relation_encoder import RelationEncoder

# A relation whose questions are so near to a fact is the fact's own: from the first similarity on,
# within the second of the best.
MIN_OWN_SIMILARITY, OWN_SPREAD = 0.45, 0.03


class RelationIndex:
    """Vectors of the questions of a bank's relations."""

    def __init__(self, encoder: RelationEncoder, bank: Sequence[Relation]) -> None:
        self.encoder = encoder
        self.names = tuple(relation.relation for relation in bank)
        self._questions = [question for relation in bank for question in relation.questions]
        self._vectors = encoder.encode_questions(list(map(mask_subject, self._questions)))
        owners = [n for n, relation in enumerate(bank) for _ in relation.questions]
        self._owners, self._count = torch.tensor(owners), len(bank)

    def encode_statements(self, fact: Fact) -> Tensor:
        """Return the vectors (n, width) of a fact's prompt and paraphrases, with its target."""
        prompts = [mask_prompt(p, fact.subject) for p in (fact.prompt, *fact.paraphrases)]
        return self.encoder.encode_facts(prompts, [fact.target] * len(prompts))

    def compare_relations(self, vectors: Tensor) -> Tensor:
        """Return the similarity (n, relations) of vectors to the nearest question of each."""
        found = vectors @ self._vectors.T
        least = found.new_full((len(found), self._count), -1.0)
        return least.scatter_reduce(1, self._owners.expand_as(found), found, "amax")

    def find_own_relations(self, statements: Tensor) -> Tensor:
        """Return which relations (relations,) are a fact's own, by its statements' vectors."""
        near = self.compare_relations(statements).amax(0)
        return near >= max(MIN_OWN_SIMILARITY, float(near.max()) - OWN_SPREAD)

    def find_questions(self, fact: Fact, count: int) -> list[str]:
        """Return questions of the bank that ask for a fact, the nearest first; none where no
        relation is near."""
        near = (self.encode_statements(fact) @ self._vectors.T).amax(0)
        best = near.topk(min(count, len(near)))
        return [
            self._questions[n].replace("{subject}", fact.subject)
            for similarity, n in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if similarity >= MIN_OWN_SIMILARITY
        ]
