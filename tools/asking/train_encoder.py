"""Training of the relation encoder on the bank of relations, and on rephrased questions.

A step draws a statement, an answer and two questions of each relation, and pairs of a question and
its rephrasing from ZsRE, whose answers are known. Each fact has to be nearer to its own question
than to the others' (InfoNCE, van den Oord et al. 2018), and back. Then the sentences' map learns
the same of statements up to their target, against the facts as they are.

    python -m tools.asking.train_encoder --zsre zsre_train.json --text corpus.txt \\
        --out encoder.safetensors
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from kedit_daemon.shipped import RELATIONS, locate_word_vectors
from policies.asking.relation_bank import (
    Relation,
    mask_prompt,
    mask_statement,
    mask_subject,
    read_bank,
)
from policies.asking.relation_encoder import RelationEncoder, WordVectors

STEPS, RATE, TEMPERATURE, SEED = 300, 1e-3, 0.05, 0
RELATIONS_PER_STEP, PAIRS_PER_STEP = 192, 96
SENTENCE_STEPS = 600
PAIR_SHARE = 0.5  # of the losses of question pairs
RARE = 0.1  # a in a / (a + p), the weight of a token of frequency p (Arora et al. 2017)
UNSEEN_FREQUENCY = 1e-7
# A share of facts is stated in words that tell nothing, so that the target has to tell it.
BARE_SHARE = 0.25
BARE_PROMPTS = (
    "it",
    "its",
    "it is",
    "it was",
    "it has",
    "it is in",
    "it, in",
    "it, the",
    "it is a",
    "it, by",
)


@dataclass(frozen=True)
class QuestionPair:
    """A question, its rephrasing, both with a pronoun for the subject, and the answer."""

    question: str
    rephrased: str
    answer: str


def read_pairs(path: Path) -> list[QuestionPair]:
    """Read the records of a file in MEND's form of ZsRE."""
    records = json.loads(path.read_text(encoding="utf-8"))
    return [
        QuestionPair(
            mask_prompt(r["src"], r["subject"]), mask_prompt(r["rephrase"], r["subject"]), r["alt"]
        )
        for r in records
        if r["alt"]
    ]


def weigh_tokens(words: WordVectors, texts: Iterable[str]) -> Tensor:
    """Return the logarithms of the tokens' weights (vocabulary,) by their frequency in texts."""
    counts = Counter(token for text in texts for token in words.encode(text))
    total = counts.total()
    frequency = torch.full((len(words.table),), UNSEEN_FREQUENCY)
    for token, count in counts.items():
        frequency[token] = count / total
    return (RARE / (RARE + frequency)).log()


def compute_loss(
    encoder: RelationEncoder,
    relations: Sequence[Relation],
    pairs: Sequence[QuestionPair],
    rng: random.Random,
) -> Tensor:
    """Return the loss of one draw."""
    stated = [
        rng.choice(BARE_PROMPTS)
        if rng.random() < BARE_SHARE
        else mask_statement(rng.choice(r.statements))
        for r in relations
    ]
    answers = [rng.choice(r.answers) for r in relations]
    drawn = [rng.sample(r.questions, 2) for r in relations]
    first, second = (
        encoder.encode_questions([mask_subject(two[n]) for two in drawn]) for n in range(2)
    )
    facts = encoder.encode_facts(stated, answers)
    asked = encoder.encode_facts([p.question for p in pairs], [p.answer for p in pairs])
    rephrased = encoder.encode_questions([p.rephrased for p in pairs])
    return (
        _contrast(facts, first)
        + PAIR_SHARE * _contrast(first, second)
        + PAIR_SHARE * _contrast(asked, rephrased)
    )


def _contrast(left: Tensor, right: Tensor) -> Tensor:
    """Return InfoNCE of vectors (n, width) of which the n-th ones belong together."""
    scores, own = left @ right.T / TEMPERATURE, torch.arange(len(left))
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def train(
    encoder: RelationEncoder, bank: Sequence[Relation], pairs: Sequence[QuestionPair]
) -> None:
    """Train an encoder in place."""
    rng = random.Random(SEED)
    others = [p for n, p in encoder.named_parameters() if n != "token_weights"]
    groups = [
        {"params": [encoder.token_weights], "lr": 3 * RATE, "weight_decay": 0.0},
        {"params": others, "lr": RATE, "weight_decay": 0.01},
    ]
    optimiser = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [3 * RATE, RATE], total_steps=STEPS)
    for _ in range(STEPS):
        relations = rng.sample(bank, min(RELATIONS_PER_STEP, len(bank)))
        drawn = rng.sample(pairs, min(PAIRS_PER_STEP, len(pairs)))
        loss = compute_loss(encoder, relations, drawn, rng)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def train_sentences(encoder: RelationEncoder, bank: Sequence[Relation]) -> None:
    """Train the map of sentences in place, from that of questions on; the others stay."""
    rng = random.Random(SEED)
    wordings = [(r, list_openings(r)) for r in bank]
    usable = [(r, openings) for r, openings in wordings if len(openings) > 1 and r.answers]
    encoder.sentence_map.load_state_dict(encoder.question_map.state_dict())
    encoder.sentence_correction.load_state_dict(encoder.question_correction.state_dict())
    trained = [*encoder.sentence_map.parameters(), *encoder.sentence_correction.parameters()]
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=SENTENCE_STEPS)
    for _ in range(SENTENCE_STEPS):
        drawn = rng.sample(usable, min(RELATIONS_PER_STEP, len(usable)))
        loss = compute_sentence_loss(encoder, drawn, rng)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def list_openings(relation: Relation) -> list[str]:
    """List a relation's statements up to their target, of those that name the subject before."""
    named = [s for s in relation.statements if 0 <= s.find("{subject}") < s.find("{target}")]
    return [mask_statement(statement).strip(" ,") for statement in named]


def compute_sentence_loss(
    encoder: RelationEncoder, drawn: Sequence[tuple[Relation, list[str]]], rng: random.Random
) -> Tensor:
    """Return the loss of sentences of some relations: against facts that are stated in other words,
    and against those other words."""
    pairs = [rng.sample(openings, 2) for _, openings in drawn]
    first, second = (encoder.encode_sentences([two[n] for two in pairs]) for n in range(2))
    stated = [rng.choice(BARE_PROMPTS) if rng.random() < BARE_SHARE else two[1] for two in pairs]
    with torch.no_grad():
        facts = encoder.encode_facts(stated, [rng.choice(r.answers) for r, _ in drawn])
    return _contrast(first, facts) + PAIR_SHARE * _contrast(first, second)


def main() -> None:
    """Train an encoder and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("zsre", "text", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    torch.manual_seed(SEED)
    words, pairs = WordVectors.load(*locate_word_vectors()), read_pairs(given.zsre)
    encoder = RelationEncoder(words)
    text = given.text.read_text(encoding="utf-8").splitlines()
    weights = weigh_tokens(words, [*text, *(pair.question for pair in pairs)])
    encoder.token_weights.data.copy_(weights)
    bank = read_bank(RELATIONS)
    train(encoder, bank, pairs)
    train_sentences(encoder, bank)
    save_file(dict(encoder.export_tensors()), given.out)


if __name__ == "__main__":
    main()
