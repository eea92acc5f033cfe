"""The page on which a person asks the model, as it is now and as it was before any edit."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.routing import BaseRoute

from kedit_daemon.home import Home, open_database
from kedit_daemon.serve.dashboard.rendering import (
    DashboardPage,
    PageFrame,
    PageRequest,
    load_fact,
    parse_choice,
)
from memory.db.queries import fetch_facts_by_id, find_weights_facts
from memory.errors import KeditError
from memory.facts import fill_subject

MAX_PROMPT_CHARS = 4000
TOKEN_CHOICES = (20, 40, 100, 200)  # lengths of an answer to choose from
DEFAULT_TOKENS = 40


@dataclass(frozen=True)
class AskedPrompt:
    """A text to go on from, or a user's question in a chat, behind a system message or none."""

    text: str
    is_chat: bool = False
    system: str = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation, of roles and contents."""
        before = [{"role": "system", "content": self.system}] if self.system else []
        return [*before, {"role": "user", "content": self.text}]


@dataclass(frozen=True)
class AnswerPair:
    """The answers of both models to one prompt, the generation of the edited one, and the ids of
    the facts of the side memory that fired."""

    edited: str
    base: str
    generation: int
    fired: tuple[str, ...] = ()


AskBoth = Callable[[AskedPrompt, int], Awaitable[AnswerPair]]
"""Answers by at most a number of tokens with the edited and the unedited model. Raises KeditError:
there is no chat template ("no-chat-template"), or it refuses the messages ("bad-request")."""


class AskPage:
    """The form, and the answers below it."""

    def __init__(self, home: Home, ask_both: AskBoth) -> None:
        self.home, self.ask_both = home, ask_both

    def build_routes(self, frame: PageFrame) -> list[BaseRoute]:
        """Return the routes of the page."""
        return [
            frame.page_route("/ask", self.show_ask_form),
            frame.page_route("/ask", self.answer_prompt, "POST"),
        ]

    def show_ask_form(self, request: PageRequest) -> DashboardPage:
        """Show the form, with the question of the fact that is named, if one is."""
        prompt = ""
        if name := request.query.get("fact"):
            with open_database(self.home) as conn:
                fact = load_fact(conn, name)
            prompt = fill_subject(fact["prompt"], fact["subject"])
        return self._build_ask_page(AskedPrompt(prompt), DEFAULT_TOKENS)

    async def answer_prompt(self, request: PageRequest) -> DashboardPage:
        """Answer what the form asks."""
        form = request.form
        is_chat = form.get("form") == "chat"
        system = form.get("system", "").strip() if is_chat else ""
        asked = AskedPrompt(form.get("prompt", ""), is_chat, system)
        tokens = parse_choice(form, "tokens", DEFAULT_TOKENS, TOKEN_CHOICES)
        if problem := _find_problem(asked):
            return self._build_ask_page(asked, tokens, status=400, problem=problem)
        try:
            answers = await self.ask_both(asked, tokens)
        except KeditError as error:
            if error.code not in ("no-chat-template", "bad-request"):
                raise
            return self._build_ask_page(asked, tokens, status=400, problem=f"{error}.")
        fired = await run_in_threadpool(self._find_fired, asked.text, answers)
        return self._build_ask_page(asked, tokens, answers=answers, fired=fired)

    def _find_fired(self, prompt: str, answers: AnswerPair) -> list[dict[str, Any]]:
        with open_database(self.home) as conn:
            if answers.fired:
                return fetch_facts_by_id(conn, answers.fired)
            return find_weights_facts(conn, prompt)

    def _build_ask_page(
        self, asked: AskedPrompt, tokens: int, status: int = 200, **fields: Any
    ) -> DashboardPage:
        context = {
            "asked": asked,
            "tokens": tokens,
            "choices": TOKEN_CHOICES,
            "longest": MAX_PROMPT_CHARS,
            **{"answers": None, "fired": [], "problem": None, **fields},
        }
        return DashboardPage("ask.html", "Ask", context, status)


def _find_problem(asked: AskedPrompt) -> str | None:
    """Return why a question cannot be asked; None if it can."""
    if not asked.text.strip():
        return "Write a question." if asked.is_chat else "Write something to go on from."
    if max(len(asked.text), len(asked.system)) > MAX_PROMPT_CHARS:
        return f"That is longer than {MAX_PROMPT_CHARS:,} characters."
    return None
