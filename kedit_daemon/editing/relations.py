"""The shipped relations, and the reader of questions that is made of them."""

from functools import lru_cache

from kedit_daemon.shipped import RELATION_ENCODER, RELATIONS, locate_word_vectors
from memory.model.chat_layout import find_chat_layout
from memory.model.editable import EditableModel
from policies.asking.asked_facts import AskedFacts
from policies.asking.relation_bank import read_bank
from policies.asking.relation_encoder import RelationEncoder, WordVectors
from policies.asking.relation_index import RelationIndex


@lru_cache(maxsize=1)
def load_relation_index() -> RelationIndex:
    """Load the shipped relations and their encoder, once in a process: they never change."""
    words = WordVectors.load(*locate_word_vectors())
    return RelationIndex(RelationEncoder.load(words, RELATION_ENCODER), read_bank(RELATIONS))


def make_reader(model: EditableModel) -> AskedFacts | None:
    """Make a reader of questions for a model; None for one without a chat template, which continues
    texts and is not asked."""
    chat = find_chat_layout(model.tokenizer)
    return AskedFacts(load_relation_index) if chat is not None else None
