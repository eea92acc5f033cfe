"""A fact as rows of tokens: its prompt in several contexts, its target after it, its site."""

from dataclasses import dataclass

import torch
from torch import Tensor

from memory.errors import Rejected
from memory.facts import Fact
from memory.model.editable import EditableModel
from policies.edit_site import EditSite

# Unrelated sentences before the prompt, so that an edit does not hang on standing first.
CONTEXTS = (
    "",
    "It rained for most of the afternoon. ",
)
MAX_PARAPHRASES = 2
# What may be asked of people, places, works and companies. An edit is about one thing of its
# subject, and these stand for everything else.
SUBJECT_QUESTIONS = (
    "{} was born in the city of",
    "The mother tongue of {} is",
    "{} works as a",
    "The religion of {} is",
    "{} plays the sport of",
    "The spouse of {} is",
    "{} is famous for",
    "The capital of {} is",
    "The country of {} is",
    "{} belongs to the continent of",
    "The main office of {} is in",
    "The name of the founder of {} is",
    "The genre of {} is",
    "{} was first written in the language",
    "{} was employed by",
    "{} is a member of",
    "{} is named after",
    "{}, which lies in",
    "{}, developed by",
    "{} speaks",
    "{} is part of",
    "{} is owned by",
    "{} is a kind of",
    "{} died of",
    "{} was released in",
)
IGNORE_LABEL = -100  # the label of a token that is not the target's


@dataclass(frozen=True)
class TokenRow:
    """Prompt and target ids, and where the subject ends: at the prompt's end if it is not in it."""

    ids: tuple[int, ...]
    prompt_length: int
    subject_index: int

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.ids[: self.prompt_length]

    @property
    def target(self) -> tuple[int, ...]:
        return self.ids[self.prompt_length :]


@dataclass(frozen=True)
class TokenBatch:
    """Rows padded to one width: ids (rows, tokens), ends of subject and prompt (rows,).

    Pads stand on the right, where causal attention keeps them from every real token.
    """

    ids: Tensor
    subject_index: Tensor
    end_index: Tensor


def find_subject_end(model: EditableModel, text: str, subject: str) -> int | None:
    """The position of the subject's last token in the encoded prompt, if the subject is in it."""
    ids = model.encode(text)
    at = text.rfind(subject)
    if at < 0:
        return None
    before = model.encode(text[: at + len(subject)])
    shared = next(
        (n for n, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b),
        min(len(before), len(ids)),
    )
    return max(shared - 1, 0)


def make_rows(model: EditableModel, fact: Fact) -> list[TokenRow]:
    """The rows that an edit of this fact learns from.

    Raises Rejected when the model cannot read the fact.
    """
    texts = [context + fact.question for context in CONTEXTS]
    texts += fact.filled_paraphrases[:MAX_PARAPHRASES]
    rows = []
    for text in texts:
        prompt = model.encode(text)
        target = model.encode_target(text, fact.target)
        if model.end_token is not None:
            target = [*target, model.end_token]
        if not prompt or not target or len(prompt) + len(target) > model.max_positions:
            raise Rejected(
                f"the fact does not fit the model: {len(prompt)} + {len(target)} tokens, "
                f"of {model.max_positions} at most",
                hint="shorten the prompt or the target",
            )
        ids = (*prompt, *target)
        subject = find_subject_end(model, text, fact.subject)
        at = len(prompt) - 1 if subject is None else min(subject, len(prompt) - 1)
        rows.append(TokenRow(ids, len(prompt), at))
    return rows


def estimate_key_bytes(model: EditableModel, site: EditSite, fact: Fact) -> int:
    """What a fact's keys take in a solve, in float32: in each edited layer a key for every
    context, and in an end layer for every token of the target."""
    contexts = len(CONTEXTS) + len(fact.filled_paraphrases[:MAX_PARAPHRASES])
    tokens = len(model.encode_target(fact.question, fact.target)) + (model.end_token is not None)
    keys = {n: 1 if n in site.subject_layers else tokens for n in site.layers}
    return sum(4 * contexts * k * model.base_weight(n).shape[1] for n, k in keys.items())


def make_essence_row(model: EditableModel, fact: Fact) -> TokenRow:
    """The row on which an edit must leave the subject what it is (Meng et al. 2022, section 3.1):
    a prompt with no relation in it. Its last token stands for a target."""
    ids = tuple(model.encode(f"{fact.subject} is a"))
    subject = find_subject_end(model, f"{fact.subject} is a", fact.subject)
    return TokenRow((*ids, ids[-1]), len(ids), len(ids) - 1 if subject is None else subject)


def pad_rows(rows: list[TokenRow], width: int, filler: int, device: torch.device) -> TokenBatch:
    """Rows side by side."""
    ids = torch.full((len(rows), width), filler)
    for n, row in enumerate(rows):
        ids[n, : len(row.ids)] = torch.tensor(row.ids)
    return TokenBatch(
        ids.to(device),
        torch.tensor([r.subject_index for r in rows], device=device),
        torch.tensor([r.prompt_length - 1 for r in rows], device=device),
    )
