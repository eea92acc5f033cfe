"""Encoder of questions, of sentences that go on, and of facts into one space, where both are near
the facts that they ask for or come to state, whoever the subject is.

A text is the mean of static word vectors, each weighted by what its token tells, which learned maps
then turn: one for questions, one for sentences, one for a fact's prompt with its target. The target
tells the relation where the prompt does not ("… is in Antarctica" answers "Which continent …?").
Trained on a bank of relations, contrastively, as in dense retrieval (Karpukhin et al. 2020), by
`tools/asking`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

TARGET_SCALE = 0.25  # of the target's map before it is trained: the prompt tells more


@dataclass(frozen=True)
class WordVectors:
    """Static vectors (vocabulary, width) of a tokenizer's tokens."""

    table: Tensor
    tokenizer: Tokenizer

    @classmethod
    def load(cls, table: Path, tokenizer: Path) -> "WordVectors":
        """Load from a safetensors file with one tensor, and a tokenizer's JSON file."""
        (vectors,) = load_file(table).values()
        words = Tokenizer.from_file(str(tokenizer))
        words.no_padding()
        words.no_truncation()
        return cls(vectors, words)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; one at least, so that every text has a mean."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids) or [0]


class RelationEncoder(nn.Module):
    """Unit vectors (texts, width) of questions, of sentences and of facts."""

    def __init__(self, words: WordVectors) -> None:
        super().__init__()
        self.words, width = words, words.table.shape[1]
        self.token_weights = nn.Parameter(torch.zeros(len(words.table)))  # logarithms
        self.question_map = _identity(width, 1.0)
        self.prompt_map = _identity(width, 1.0)
        self.target_map = _identity(width, TARGET_SCALE)
        self.question_correction = _correction(width, width)
        self.sentence_map = _identity(width, 1.0)
        self.sentence_correction = _correction(width, width)
        self.fact_correction = _correction(2 * width, width)

    @classmethod
    def load(cls, words: WordVectors, path: Path) -> "RelationEncoder":
        """Load trained maps from a safetensors file."""
        encoder = cls(words)
        encoder.load_state_dict({n: t.float() for n, t in load_file(path).items()})
        return encoder.train(False).requires_grad_(False)

    def average(self, texts: Sequence[str]) -> Tensor:
        """Return the weighted means (texts, width) of the texts' word vectors, of unit length."""
        tokens = [self.words.encode(text) for text in texts]
        ids = torch.tensor([token for row in tokens for token in row])
        starts = torch.tensor([0, *map(len, tokens)]).cumsum(0)[:-1]
        weights = self.token_weights[ids].exp()
        summed = F.embedding_bag(
            torch.arange(len(ids)),
            self.words.table[ids].float(),
            starts,
            mode="sum",
            per_sample_weights=weights,
        )
        return F.normalize(summed, dim=-1)

    def encode_questions(self, questions: Sequence[str]) -> Tensor:
        """Return the vectors of questions, with a pronoun for their subject."""
        mean = self.average(questions)
        return F.normalize(self.question_map(mean) + self.question_correction(mean), dim=-1)

    def encode_sentences(self, sentences: Sequence[str]) -> Tensor:
        """Return the vectors of sentences up to a target, with a pronoun for their subject."""
        mean = self.average(sentences)
        return F.normalize(self.sentence_map(mean) + self.sentence_correction(mean), dim=-1)

    def encode_facts(self, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
        """Return the vectors of facts: prompts, with a pronoun for their subject, and targets."""
        stated, answered = self.average(prompts), self.average(targets)
        both = torch.cat([stated, answered], 1)
        joint = self.prompt_map(stated) + self.target_map(answered) + self.fact_correction(both)
        return F.normalize(joint, dim=-1)

    def export_tensors(self) -> Mapping[str, Tensor]:
        """Return the trained maps in half precision, to be saved."""
        return {n: t.detach().half().contiguous() for n, t in self.state_dict().items()}


def _identity(width: int, scale: float) -> nn.Linear:
    layer = nn.Linear(width, width, bias=False)
    nn.init.eye_(layer.weight)
    layer.weight.data *= scale
    return layer


def _correction(inputs: int, outputs: int) -> nn.Sequential:
    """Return a map that is 0 before it is trained."""
    last = nn.Linear(outputs, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), last)
