"""Shards of the side memory: a fact's low-rank delta, its keys, and the gates of a match."""

from dataclasses import dataclass

from torch import Tensor

THRESHOLD_RATIO = 0.15  # of a shard's threshold to the least distance on its own prompts


@dataclass(frozen=True)
class Delta:
    """ΔW = B A of low rank: `up` is B (hidden, rank), `down` is A (rank, width). Both may have
    batch dimensions in front."""

    up: Tensor
    down: Tensor

    def apply_to(self, inputs: Tensor) -> Tensor:
        """Compute ΔW k (..., hidden) of inputs k (..., width), without forming ΔW."""
        return inputs @ self.down.mT @ self.up.mT


@dataclass(frozen=True)
class Shard:
    """ΔW of a fact, the least activation distance at which it fires, and whether it has learned to
    be asked in words."""

    delta: Delta
    threshold: float
    is_asked: bool = False


@dataclass(frozen=True)
class RetrievalKeys:
    """Retrieval keys of a fact, of unit length: subject (n, hidden) and end (m, hidden). If a
    picture is the subject, its key is what the model sees of it."""

    subject: Tensor
    end: Tensor


@dataclass(frozen=True)
class RoutingGates:
    """Layers of the keys, and the least cosines that route. `min_unnamed_cosine` is for subject
    keys when the prompt does not name the subject, of facts that do not always name it either.
    `min_words_score` is for the score of a question's words, or of a sentence's, where words
    decide, and `min_reply_cosine` for end keys within the reply of a chat. `min_picture_cosine` is
    for what is seen of two pictures of one thing."""

    key_layer: int
    side_layer: int
    min_subject_cosine: float
    min_end_cosine: float
    min_unnamed_cosine: float
    min_words_score: float = 1.0
    # On SmolLM2-135M no reply to another question about a subject reached .7 with the keys of a
    # prompt alone; those of other wordings are more.
    min_reply_cosine: float = 0.75
    # On the shipped vision model 96 % of other drawings of a building are nearer than this to it
    # or one of its variants, and 1.5 % of the pictures of others to the nearest of 200.
    min_picture_cosine: float = 0.93


@dataclass(frozen=True)
class RoutingMatch:
    """The fact that fires for a row: its shard, the cosine of its end key, or the score of the
    question's words, and the ratio of the activation distance to the shard's threshold."""

    fact_id: str
    shard_id: int
    score: float
    margin: float

    @property
    def boost(self) -> float:
        """By how much the shift ΔW a is lengthened where the fact fires, to be as long as on the
        shard's own prompts at least; up to what a shard that just confirms needs."""
        return 1 / min(max(THRESHOLD_RATIO * self.margin, THRESHOLD_RATIO), 1.0)
