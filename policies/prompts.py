"""Token rows of a fact: its prompt in several contexts, each followed by the target."""

from dataclasses import dataclass

import torch
from torch import Tensor

from memory.errors import Rejected
from memory.facts import Fact
from memory.model.editable import EditableModel
from memory.model.generate import cut_first_sentence
from policies.edit_site import EditSite

# Unrelated sentences before the prompt, so that an edit does not depend on being first in the text.
CONTEXTS = ("", "It rained for most of the afternoon. ")
MAX_PARAPHRASES = 2
# Questions about people, places, works and companies. An edit is about one relation of its subject,
# and these stand for all others.
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
# The same of a picture.
PICTURE_QUESTIONS = (
    "{} What is in this picture?",
    "{} What colour is it?",
    "{} How many are there?",
    "{} What shape is it?",
    "{} Where was this taken?",
    "{} Who made this?",
    "{} How old is it?",
    "{} What is in the background?",
    "{} What is at the top of it?",
    "{} Which colour is the left part?",
    "{} How many parts does it have?",
    "{} What kind of day is it?",
    "{} Describe it.",
)
IGNORE_LABEL = -100  # of a token that is not part of a target


@dataclass(frozen=True)
class TokenRow:
    """Prompt and target ids, and the index of the subject's last token (the prompt's end if the
    subject is not in it)."""

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

    Pads are on the right, where causal attention hides them from every real token.
    """

    ids: Tensor
    subject_index: Tensor
    end_index: Tensor


def find_subject_end(model: EditableModel, text: str, subject: str) -> int | None:
    """Return the index of the subject's last token in the encoded text; None if it is not there."""
    ids = model.encode(text)
    start = text.rfind(subject)
    if start < 0:
        return None
    head = model.encode(text[: start + len(subject)])
    pairs = enumerate(zip(head, ids, strict=False))
    shared = next((n for n, (a, b) in pairs if a != b), min(len(head), len(ids)))
    return max(shared - 1, 0)


def make_rows(model: EditableModel, fact: Fact, ending: str = "") -> list[TokenRow]:
    """Return the rows from which an edit learns; raises Rejected for a fact that does not fit the
    model. ending: text behind the target; if empty, or not taken for the end of a sentence there
    ("Au.", "Henry V."), the token that ends a text."""
    texts = [context + fact.question for context in CONTEXTS]
    texts += fact.filled_paraphrases[:MAX_PARAPHRASES]
    said, rows = end_target(fact.target, ending), []
    for text in texts:
        prompt = model.encode(text)
        target = model.encode_target(text, said, fact.join)
        if said == fact.target and model.end_token is not None:
            target = [*target, model.end_token]
        if not prompt or not target or len(prompt) + len(target) > model.max_positions:
            raise Rejected(
                f"the fact does not fit the model: {len(prompt)} + {len(target)} tokens, "
                f"of {model.max_positions} at most",
                hint="shorten the prompt or the target",
            )
        ids = (*prompt, *target)
        subject = find_subject_end(model, text, fact.subject)
        end = len(prompt) - 1
        rows.append(TokenRow(ids, len(prompt), end if subject is None else min(subject, end)))
    return rows


def end_target(target: str, ending: str) -> str:
    """Write an ending behind a target where an answer is cut at it, else the target alone."""
    is_cut = cut_first_sentence(f"{target}{ending} It") == target
    return target + ending if is_cut and not target.endswith((".", "!", "?")) else target


def estimate_key_bytes(model: EditableModel, site: EditSite, fact: Fact) -> int:
    """Return the float32 bytes of a fact's keys in a solve: per edited layer one key for every
    context, and in an end layer for every token of the target."""
    contexts = len(CONTEXTS) + len(fact.filled_paraphrases[:MAX_PARAPHRASES])
    target = model.encode_target(fact.question, fact.target, fact.join)
    tokens = len(target) + 1  # and its ending
    keys = {n: 1 if n in site.subject_layers else tokens for n in site.layers}
    return sum(4 * contexts * k * model.base_weight(n).shape[1] for n, k in keys.items())


def make_essence_row(model: EditableModel, fact: Fact) -> TokenRow:
    """Return the row of the essence KL (Meng et al. 2022, section 3.1): a prompt that names no
    relation, on which an edit must not change the subject. Its last token stands for a target."""
    prompt = f"{fact.subject} is a"
    ids, subject = tuple(model.encode(prompt)), find_subject_end(model, prompt, fact.subject)
    return TokenRow((*ids, ids[-1]), len(ids), len(ids) - 1 if subject is None else subject)


def pad_rows(rows: list[TokenRow], width: int, filler: int, device: torch.device) -> TokenBatch:
    """Pad rows on the right to `width` tokens with the id `filler`."""
    ids = torch.full((len(rows), width), filler)
    for n, row in enumerate(rows):
        ids[n, : len(row.ids)] = torch.tensor(row.ids)
    return TokenBatch(
        ids.to(device),
        torch.tensor([r.subject_index for r in rows], device=device),
        torch.tensor([r.prompt_length - 1 for r in rows], device=device),
    )
