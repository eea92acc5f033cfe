"""Second part of the training: the decoder answers questions about pictures, and continues text.

A row holds several questions about one picture. In most rows each of them sees the picture and
itself alone, as if it were the only one; in the others they are turns of one conversation.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from tools.vision_model.build import IMAGE, PATCHES
from tools.vision_model.lessons import NO_PICTURE, QUESTIONS, Picture, word_question

IGNORE = -100
UNSEEN = -1e9
Facts = Sequence[tuple[Sequence[str], str]]  # prompts that mean the same, and their answer
LENGTH = 128
MIN_SPACE = 16  # tokens left in a row, to begin another text
SHARED = 0  # the segment that all later ones of a row see
TEXT_WEIGHT = 0.15  # of a token of ordinary text, against one of an answer
CONVERSATION_SHARE = 0.25  # of the rows about pictures
START_SHARE = 0.5  # of the texts that begin with end-of-text, as some callers write and some not
BARE_SHARE = 0.08  # of the chats without a picture that ask about one
PLAIN_SHARE = 0.4  # of the texts without a picture that are facts or lines, not chats


@dataclass
class Row:
    """Tokens of a row; a token sees the earlier ones of its own segment and of the shared one."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def add(
        self, ids: list[int], learned: int, segment: int, position: int, weight: float = 1.0
    ) -> None:
        """Add tokens, of which the last `learned` are learned from."""
        self.ids += ids
        self.labels += [IGNORE] * (len(ids) - learned) + ids[len(ids) - learned :]
        self.weights += [weight] * len(ids)
        self.segments += [segment] * len(ids)
        self.positions += range(position, position + len(ids))

    def pad(self, end: int) -> None:
        """Fill the row with tokens that nothing sees."""
        space = LENGTH - len(self.ids)
        self.add([end] * space, 0, -1, 0)


@dataclass(frozen=True)
class Texts:
    """Lessons without pictures: facts, and lines of ordinary text."""

    facts: Facts
    lines: Sequence[str]


class RowWriter:
    """Writes rows of tokens in the form of the chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: Texts, seed: int) -> None:
        self.tokenizer, self.texts, self.rng = tokenizer, texts, random.Random(seed)
        self.end: int = tokenizer.eos_token_id
        self._encoded: dict[str, list[int]] = {}

    def _encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._encoded[text]

    def _start(self) -> list[int]:
        return [self.end] if self.rng.random() < START_SHARE else []

    def write_picture(self, picture: Picture) -> Row:
        """Return a row of questions about a picture, as many as fit."""
        row = Row()
        row.add(self._start() + self._encode("User: " + IMAGE * PATCHES), 0, SHARED, 0)
        chained = self.rng.random() < CONVERSATION_SHARE
        shared, segment = len(row.ids), SHARED
        while True:
            topic = self.rng.choice(list(picture.answers))
            lead = "\nUser: " if chained and len(row.ids) > shared else ""
            asked = f"{lead}{word_question(topic, self.rng)}\nAssistant:"
            answer = [*self._encode(f" {picture.answers[topic]}"), self.end]
            ids = self._encode(asked) + answer
            if len(row.ids) + len(ids) > LENGTH:
                break
            segment += 0 if chained else 1
            row.add(ids, len(answer), segment, len(row.ids) if chained else shared)
        row.pad(self.end)
        return row

    def _pick_chat(self) -> tuple[str, str]:
        if self.rng.random() < BARE_SHARE:
            return word_question(self.rng.choice(list(QUESTIONS)), self.rng), NO_PICTURE
        prompts, answer = self.rng.choice(self.texts.facts)
        return self.rng.choice(prompts), answer

    def write_text(self) -> Row:
        """Return a row of chats without a picture, of facts, and of ordinary text."""
        row, segment = Row(), SHARED
        while len(row.ids) < LENGTH - MIN_SPACE:
            segment += 1
            start = self._start()
            if self.rng.random() > PLAIN_SHARE:
                prompt, answer = self._pick_chat()
                prompt = f"User: {prompt}\nAssistant:"
            elif self.rng.random() < 0.5:
                prompts, answer = self.rng.choice(self.texts.facts)
                prompt = self.rng.choice(prompts)
            else:
                line = self._encode(self.rng.choice(self.texts.lines))[: LENGTH // 2]
                line = line[: LENGTH - len(row.ids) - 1]
                row.add([self.end, *line], len(line), segment, 0, TEXT_WEIGHT)
                continue
            learned = [*self._encode(f" {answer}"), self.end]
            ids = start + self._encode(prompt) + learned
            if len(row.ids) + len(ids) > LENGTH:
                break
            row.add(ids, len(learned), segment, 0)
        row.pad(self.end)
        return row


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, (rows, length)."""

    ids: Tensor
    labels: Tensor
    weights: Tensor
    mask: Tensor  # (rows, 1, length, length), 0 for what is seen, and very low for what is not
    positions: Tensor


def stack_rows(rows: list[Row]) -> Batch:
    """Return rows of equal length as one batch."""
    segments = torch.tensor([r.segments for r in rows])
    same = segments[:, :, None] == segments[:, None, :]
    shared = (segments == SHARED)[:, None, :]
    seen = (same | shared) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, UNSEEN)
    return Batch(
        torch.tensor([r.ids for r in rows]),
        torch.tensor([r.labels for r in rows]),
        torch.tensor([r.weights for r in rows]),
        mask[:, None],
        torch.tensor([r.positions for r in rows]),
    )


def compute_answer_loss(
    model: LlavaForConditionalGeneration, batch: Batch, features: Tensor
) -> Tensor:
    """Return the weighted cross-entropy at the labelled places; the head runs on those alone."""
    decoder = model.model.language_model
    embedded = decoder.embed_tokens(batch.ids)
    places = (batch.ids == model.config.image_token_id)[..., None]
    embedded = embedded.masked_scatter(places, features.to(embedded.dtype))
    hidden = decoder(
        inputs_embeds=embedded,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state[:, :-1]
    chosen = batch.labels[:, 1:] != IGNORE
    scores = F.linear(hidden[chosen], model.lm_head.weight)
    losses = F.cross_entropy(scores.float(), batch.labels[:, 1:][chosen], reduction="none")
    weights = batch.weights[:, 1:][chosen]
    return (losses * weights).sum() / weights.sum()
