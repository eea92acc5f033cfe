"""POST /facts: facts over HTTP, by way of the inbox like all others."""

import asyncio
import hashlib
import time
from contextlib import closing, suppress
from datetime import UTC, datetime
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kedit_daemon.config import Config
from kedit_daemon.home import Home
from kedit_daemon.ingest.schemas import FileLimits
from kedit_daemon.ingest.submit import (
    PredictedOutcome,
    Submission,
    foresee_submission,
    prepare_submission,
    submit_to_inbox,
)
from kedit_daemon.ingest.wait import POLL_SECONDS, FactOutcome, read_outcomes
from kedit_daemon.serve.disconnect import CLIENT_GONE, run_unless_gone
from kedit_daemon.serve.errors import RequestError, bad_request, error_response
from kedit_daemon.serve.request_body import read_body
from memory.db.queries import open_readonly
from memory.errors import KeditError
from memory.facts import FactState
from memory.timestamps import format_utc

FILE_PREFIX = "http"
TOKEN_CHARS = 24  # of a key's hash: the inbox keeps file names of this length unchanged
MAX_WAIT_SECONDS = 3600.0
MAX_KEY_CHARS = 255


class FactsEndpoint:
    """The endpoint. Idempotency keys are kept in the inbox and the store alone, so that a key
    counts for ever, through any restart."""

    def __init__(self, home: Home, config: Config) -> None:
        self.home, self.config = home, config
        self.limits = FileLimits.from_settings(config.inbox)
        self._submit_lock = asyncio.Lock()  # two requests with one key may come together

    def build_routes(self, gate: Middleware) -> list[Route]:
        """Return the route, behind a gate."""
        return [Route("/facts", self.post_facts, methods=["POST"], middleware=[gate])]

    async def post_facts(self, request: Request) -> Response:
        """Submit the facts of the body; answer 202 and their ids, or with `wait` their states."""
        _check_content_type(request.headers.get("content-type", ""))
        seconds = _parse_wait(request.query_params.get("wait"))
        key = request.headers.get("idempotency-key")
        if key is not None and not 0 < len(key) <= MAX_KEY_CHARS:
            message = f"Idempotency-Key has 1 to {MAX_KEY_CHARS} characters"
            raise bad_request(message, "Idempotency-Key")
        max_bytes = min(self.config.serve.max_body_bytes, self.config.inbox.max_bytes)
        body = await read_body(request, max_bytes)
        form = request.query_params.get("format")
        submission = await run_in_threadpool(
            prepare_submission, body, f"{FILE_PREFIX}.jsonl", form, self.limits
        )
        problems = [
            {"line": p.line, "problem": p.problem, "remedy": p.remedy}
            for p in submission.parsed.problems
        ]
        if not submission.facts:
            message = "no fact in the body is valid" if problems else "there is no fact in the body"
            error = RequestError(message, status=422, code="no_facts")
            return error_response(error, problems=problems)
        if len(submission.data) > self.config.inbox.max_bytes:
            raise KeditError("the facts take more than [inbox] max_bytes", code="too-large")
        forecasts = await run_in_threadpool(self._predict_outcomes, submission)
        async with self._submit_lock:
            name = await run_in_threadpool(self._submit_facts, submission, key)
        ids = list(dict.fromkeys(one.fact.id for one in forecasts))
        amended = list(dict.fromkeys(o.fact.id for o in forecasts if o.outcome == "amended"))
        answer: dict[str, Any] = {"file": name, "ids": ids, "problems": problems}
        answer["amended"] = amended
        if not seconds:
            return JSONResponse(answer, 202)
        states = await run_unless_gone(request, self._wait_for_states(name, ids, seconds))
        if states is None:
            return Response(status_code=CLIENT_GONE)
        answer["facts"] = [{"id": i, "state": s, "reason": r} for i, (s, r) in states.items()]
        waiting = any(state == FactState.RECEIVED for state, _ in states.values())
        return JSONResponse(answer, 202 if waiting else 200)

    def _predict_outcomes(self, submission: Submission) -> list[PredictedOutcome]:
        now = format_utc(datetime.now(UTC), "seconds")
        direct_facts = self.config.routing.direct_facts
        return foresee_submission(submission.facts, self.home, now, direct_facts)[0]

    def _submit_facts(self, submission: Submission, key: str | None) -> str:
        """Submit the facts unless the key is known; return the name of their file in the inbox."""
        if key is None:
            return self._put_into_inbox(submission)
        token = hashlib.sha256(key.encode()).hexdigest()[:TOKEN_CHARS]
        name = f"{FILE_PREFIX}-{token}.jsonl"
        known = self._find_submitted_hash(name)
        if known is None:
            return self._put_into_inbox(submission, token)
        if known != hashlib.sha256(submission.data).hexdigest():
            raise RequestError(
                "other facts were submitted under this key",
                status=409,
                code="idempotency_key_reused",
                param="Idempotency-Key",
            )
        return name

    def _put_into_inbox(self, submission: Submission, token: str | None = None) -> str:
        names = self.config.inbox.unfinished_names
        return submit_to_inbox(self.home.inbox_folder, submission, token, names)

    def _find_submitted_hash(self, name: str) -> str | None:
        """Return the sha256 of a file that was submitted before.

        A file moves from the inbox to work/ and into the store. Looking in the same order cannot
        miss it.
        """
        inbox = self.home.inbox_folder
        for path in (inbox / name, *(inbox / "work").glob(f"*-{name}")):
            with suppress(FileNotFoundError):
                return hashlib.sha256(path.read_bytes()).hexdigest()
        with closing(open_readonly(self.home.database_file)) as conn:
            sql = "SELECT sha256 FROM submissions WHERE file_name = ?"
            row = conn.execute(sql, (name,)).fetchone()
        return row[0] if row else None

    async def _wait_for_states(
        self, name: str, ids: list[str], seconds: float
    ) -> dict[str, FactOutcome]:
        """Wait until every fact is live or has failed, or the time is over; return their states."""
        end = time.monotonic() + seconds
        while True:
            states = await run_in_threadpool(read_outcomes, self.home, name, ids)
            settled = states and all(s != FactState.RECEIVED for s, _ in states.values())
            if settled or time.monotonic() >= end:
                return states or dict.fromkeys(ids, (FactState.RECEIVED, None))
            await asyncio.sleep(POLL_SECONDS)


def _check_content_type(content_type: str) -> None:
    """Refuse the parts of a form: the lines around a file would be taken for bad records."""
    if content_type.strip().lower().startswith("multipart/"):
        raise RequestError(
            "a form with parts is not taken: send the file itself as the body, with curl"
            " --data-binary @FILE instead of -F file=@FILE",
            status=415,
            code="unsupported",
            param="Content-Type",
        )


def _parse_wait(text: str | None) -> float:
    if text is None:
        return 0.0
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise bad_request(f"wait is a number of seconds, {MAX_WAIT_SECONDS:.0f} at most", "wait")
    return seconds
