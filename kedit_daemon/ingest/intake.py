"""Takes claimed files in: their facts go into the store in one transaction a file."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kedit_daemon.config import Config
from kedit_daemon.ingest.inbox import Claim, Inbox
from kedit_daemon.ingest.parser import ParsedFile, RecordProblem, parse_file
from kedit_daemon.ingest.record_pictures import find_copied, read_from_inbox
from kedit_daemon.ingest.schemas import FileLimits
from kedit_daemon.ingest.validity import apply_validity
from memory.db.store import Store
from memory.errors import KeditError
from memory.facts import LIVE_STATES, Fact, FactState
from memory.picture_files import keep_picture, read_kept
from policies.routing import Route, choose_route, is_early


@dataclass
class _FactCounts:
    accepted: int = 0
    amended: int = 0
    duplicates: int = 0
    relearned_ids: list[str] = field(default_factory=list)
    shared_ids: set[str] = field(default_factory=set)


class Intake:
    """Takes claimed files in. A file that comes again after a crash is recorded once."""

    def __init__(
        self, store: Store, inbox: Inbox, config: Config, pictures_folder: Path | None = None
    ) -> None:
        """pictures_folder: keeps the pictures of facts; None where none are taken."""
        self.store, self.inbox, self.config = store, inbox, config
        self.pictures_folder = pictures_folder
        self.limits = FileLimits.from_settings(config.inbox)

    def take_file(self, claim: Claim) -> None:
        """Take one file in and move it to done/ or failed/."""
        try:
            data = self.inbox.read_claim(claim)
        except KeditError as error:
            remedy = error.hint or "put a plain, complete file into the inbox"
            self.inbox.fail_claim(claim, [RecordProblem(1, str(error), remedy, "")], whole=True)
            return
        parsed = self._parse(data, claim)
        shown = {fact.picture for _, fact in parsed.facts}
        for digest, picture in parsed.pictures.items():  # before any fact is about it
            if self.pictures_folder is not None and digest in shown:
                keep_picture(self.pictures_folder, picture)
        told = self._take_rest(claim, data, parsed)
        if not self.store.has_submission(claim.work_name):
            self._record_submission(claim, data, parsed)
        whole = not parsed.facts and bool(told)
        if told:
            self.inbox.fail_claim(claim, told, whole=whole)
        else:
            self.inbox.withdraw_report(claim)  # of what was half written before
        if not whole:
            self.inbox.finish_claim(claim)
            self.inbox.remove_copies(parsed.pictures)

    def _parse(self, data: bytes, claim: Claim) -> ParsedFile:
        read = None if self.pictures_folder is None else self._read_picture
        return parse_file(data, claim.name, None, self.limits, read)

    def _read_picture(self, name: str) -> bytes:
        """Read a picture beside a file, or one of that copy's name that is kept already. Raises
        BadPicture, OSError."""
        try:
            return read_from_inbox(self.inbox.folder, name)
        except FileNotFoundError:
            digest = find_copied(name)
            kept = digest and self.pictures_folder and read_kept(self.pictures_folder, digest)
            if not kept:
                raise
            return kept

    def _take_rest(self, claim: Claim, data: bytes, parsed: ParsedFile) -> Sequence[RecordProblem]:
        """Take in what a file has more than when it was taken in before, if it was; note what it
        has now. Return the problems to tell."""
        taken = self.inbox.taken_files.find(claim.work_name)
        before = self.store.has_submission(claim.work_name)
        if not before or taken is None or taken.size >= len(data):
            self.inbox.note_taken(claim, data)
            return parsed.problems
        known = self._parse(data[: taken.size], claim)
        old = {*known.facts, *known.problems}
        facts = [one for one in parsed.facts if one not in old]
        problems = [one for one in parsed.problems if one not in old]
        problems += _describe_halves(known, parsed)
        part = replace(claim, work_name=f"{claim.work_name}+{len(data)}")
        if not self.store.has_submission(part.work_name):
            self._record_submission(part, data, ParsedFile(facts, problems))
        self.inbox.note_taken(claim, data)
        if not self.inbox.has_report(claim):  # the older ones are done with
            return problems
        return list(dict.fromkeys((*parsed.problems, *problems)))

    def _record_submission(self, claim: Claim, data: bytes, parsed: ParsedFile) -> None:
        counts = _FactCounts()
        with self.store.db.transaction():
            for line, fact in parsed.facts:
                self._take_fact(fact, claim, line, len(parsed.facts), counts)
            if counts.relearned_ids:
                self.store.mark_amended(counts.relearned_ids)
            for problem in parsed.problems:
                self.store.db.write_event(
                    "record_failed",
                    file=claim.name,
                    line=problem.line,
                    problem=problem.problem,
                    remedy=problem.remedy,
                )
            self.store.add_submission(
                claim.work_name,
                claim.name,
                hashlib.sha256(data).hexdigest(),
                accepted=counts.accepted + counts.amended,
                failed=len(parsed.problems),
                duplicates=counts.duplicates,
            )
            self.store.db.write_event(
                "file_taken",
                file=claim.name,
                facts=counts.accepted,
                amended=counts.amended,
                duplicates=counts.duplicates,
                failed=len(parsed.problems),
            )

    def _take_fact(
        self, fact: Fact, claim: Claim, line: int, in_file: int, counts: _FactCounts
    ) -> None:
        known = self.store.find_stated(fact)
        if known is not None:
            fact = fact.with_id_of(known.fact)
        now, direct_facts = self.store.db.format_now(), self.config.routing.direct_facts
        decision = choose_route(known, fact, now, in_file, direct_facts)
        if known is not None and not fact.is_learned_like(known.fact):
            counts.relearned_ids.append(fact.id)
        if decision.route is Route.DUPLICATE:
            counts.duplicates += 1
            self.store.db.write_event("fact_duplicate", fact.id, file=claim.name, line=line)
            apply_validity(self.store, fact.id)
        elif decision.route is Route.AMEND:
            counts.amended += 1
            self.store.amend_fact(fact, claim.name, line)
            if known is not None and known.state in LIVE_STATES and is_early(fact, now):
                counts.relearned_ids.append(fact.id)
            apply_validity(self.store, fact.id)
        else:
            counts.accepted += 1
            self.store.receive_fact(fact, claim.name, in_file >= direct_facts)
            if decision.route is Route.REJECT:
                self.store.change_state(fact.id, FactState.REJECTED, reason=decision.reason)
            else:
                apply_validity(self.store, fact.id)
        if decision.route not in (Route.DUPLICATE, Route.REJECT):
            self._tell_shared_id(fact, counts)

    def _tell_shared_id(self, fact: Fact, counts: _FactCounts) -> None:
        """Record that another fact has the same external id, once a file and id."""
        shared = fact.external_id
        if shared is None or shared in counts.shared_ids:
            return
        if (other := self.store.find_sharing_id(fact)) is not None:
            counts.shared_ids.add(shared)
            self.store.db.write_event("id_shared", fact.id, external_id=shared, other=other)


def _describe_halves(known: ParsedFile, parsed: ParsedFile) -> Iterator[RecordProblem]:
    """Describe the facts that were read from records which were only half written."""
    whole = {fact.slot for _, fact in parsed.facts}
    for line, fact in known.facts:
        if fact.slot not in whole:  # or else the whole one takes its place
            problem = f"it was taken in before it was whole: {fact.question} → {fact.target}"
            yield RecordProblem(line, problem, f"kedit-daemon revert {fact.id}", "")
