"""Matching of subjects' names in text."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from memory.side.longer_names import NamePlace
from memory.side.name_forms import NameForm, make_name_form
from memory.side.worded_text import SOFT_GAPS, SPACE, UPPER, TextReader, WordedText

MAX_JOINED_WORDS = 8  # of a text, that others write as one: S.H.I.E.L.D.


def normalize_text(text: str) -> str:
    """Fold letters, their marks and digits to one case and width, and all else to single spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if _is_in_word(c) else " " for c in folded).split())


def _is_in_word(char: str) -> bool:
    """Check for a letter, a digit, or a mark: vowels are marks in the scripts of India."""
    return char.isalnum() or unicodedata.category(char)[0] == "M"


@dataclass(frozen=True, slots=True)
class Mention:
    """A name in a text, from `start` up to `end`, and the facts that have this name."""

    fact_ids: frozenset[str]
    start: int
    end: int


class SubjectMatcher:
    """Names of many facts, indexed so that a text is compared with few of them."""

    def __init__(self) -> None:
        self._reader = TextReader()
        self._forms_by_fact: dict[str, list[NameForm]] = {}
        self._facts_by_form: dict[str, dict[NameForm, set[str]]] = {}  # by letters, then form
        # Lengths, in letters, of the names with an opening, and how many forms have each.
        self._lengths_by_opening: dict[str, dict[int, int]] = {}

    def add_names(self, fact_id: str, names: Sequence[str]) -> None:
        """Set the names of a fact: its subject's, then others of the same thing."""
        self.remove_fact(fact_id)
        forms = (make_name_form(self._reader.read(name)) for name in names)
        known = self._forms_by_fact[fact_id] = list(dict.fromkeys(f for f in forms if f))
        for form in known:
            facts = self._facts_by_form.setdefault(form.letters, {})
            if form not in facts:
                facts[form] = set()
                self._index_form(form)
            facts[form].add(fact_id)

    def remove_fact(self, fact_id: str) -> None:
        """Remove a fact, if it is there."""
        for form in self._forms_by_fact.pop(fact_id, ()):
            facts = self._facts_by_form[form.letters]
            facts[form].discard(fact_id)
            if not facts[form]:
                del facts[form]
                self._unindex_form(form)
            if not facts:
                del self._facts_by_form[form.letters]

    def _index_form(self, form: NameForm) -> None:
        length = len(form.letters)
        for opening in form.find_openings():
            lengths = self._lengths_by_opening.setdefault(opening, {})
            lengths[length] = lengths.get(length, 0) + 1

    def _unindex_form(self, form: NameForm) -> None:
        length = len(form.letters)
        for opening in form.find_openings():
            lengths = self._lengths_by_opening[opening]
            lengths[length] -= 1
            if not lengths[length]:
                del lengths[length]
            if not lengths:
                del self._lengths_by_opening[opening]

    def find_named_facts(self, text: str) -> set[str]:
        """Return the facts whose subject a text names."""
        return set[str]().union(*(mention.fact_ids for mention in self.find_mentions(text)))

    def may_name(self, text: str) -> bool:
        """Check that a text, or its beginning, can name a subject: words of a name stand in it."""
        return next(self._find_known(self._reader.read(text)), None) is not None

    def find_mentions(self, text: str) -> list[Mention]:
        """Find where a text names subjects, in its order.

        Where known names overlap, the longest is meant; and none that is part of a longer name.
        """
        read = self._reader.read(text)
        found = defaultdict[tuple[bool, int, int, int], list[NameForm]](list)
        for start, end, form in self._find_known(read):
            found[form.is_loose(read, start, end), start - end, start, end].append(form)
        taken = bytearray(len(read.words))
        mentions = list[Mention]()
        for place in sorted(found):
            *_, start, end = place
            if not any(taken[start:end]):
                taken[start:end] = b"\1" * (end - start)
                mentions += self._find_meant(read, start, end, found[place])
        return sorted(mentions, key=lambda mention: mention.start)

    def _find_meant(
        self, read: WordedText, start: int, end: int, forms: Iterable[NameForm]
    ) -> Iterator[Mention]:
        """Yield the mention of those names at a place that are not part of a longer one."""
        facts, first = set[str](), start
        for form in forms:
            has_article = form.article and start and read.words[start - 1] == form.article
            begin = start - 1 if has_article and read.gaps[start] == SPACE else start
            is_careful = form.is_common_word or UPPER in read.get_kinds(begin, end)
            if not NamePlace(read, begin, end, is_careful).is_part_of_longer():
                facts |= self._facts_by_form[form.letters][form]
                first = min(first, begin)
        if facts:
            yield Mention(frozenset(facts), read.starts[first], read.ends[end - 1])

    def _find_known(self, read: WordedText) -> Iterator[tuple[int, int, NameForm]]:
        """Yield the known names in a text and their words, also of those inside longer ones."""
        words, gaps, known = read.words, read.gaps, self._lengths_by_opening
        letters, places = "".join(words), [0, *accumulate(map(len, words))]
        word_at = {place: n for n, place in enumerate(places)}
        seconds = [*places[2:], 0]
        for n, (word, place, second) in enumerate(zip(words, places, seconds, strict=False)):
            one, two = known.get(word), known.get(letters[place:second])
            if gaps[n + 1] in SOFT_GAPS or (second and gaps[n + 2] in SOFT_GAPS):
                lengths: Iterable[int] = self._find_joined_lengths(gaps, n, letters, places)
            elif one or two:
                lengths = (*(one or ()), *(two or ()))
            else:
                continue
            for length in lengths:
                end = word_at.get(place + length)
                if end is None:
                    continue
                for form in self._facts_by_form.get(letters[place : place + length], ()):
                    if form.fits(read, n, end):
                        yield n, end, form

    def _find_joined_lengths(
        self, gaps: list[str], first: int, letters: str, places: list[int]
    ) -> set[int]:
        """Find the lengths of names that begin with a word and the next one, where soft gaps do not
        count."""
        found, firm, start = set[int](), 0, places[first]
        for n in range(first + 1, min(first + 1 + MAX_JOINED_WORDS, len(places))):
            found.update(self._lengths_by_opening.get(letters[start : places[n]], ()))
            firm += gaps[n] not in SOFT_GAPS
            if firm == 2:
                break
        return found


def names_subject(texts: Iterable[str], names: Sequence[str]) -> bool:
    """Check that each of some texts has one of a subject's names."""
    matcher = SubjectMatcher()
    matcher.add_names("", names)
    return all(map(matcher.find_mentions, texts))
