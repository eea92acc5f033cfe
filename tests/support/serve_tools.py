"""What the tests of the pages share: an application around them, and how a browser sends forms."""

import html
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from starlette.applications import Starlette
from starlette.testclient import TestClient

from kedit_daemon.config import Config
from kedit_daemon.control import send_request
from kedit_daemon.editing.audit import make_thresholds
from kedit_daemon.home import Home
from kedit_daemon.serve.dashboard.ask_page import AnswerPair, AskedPrompt
from kedit_daemon.serve.dashboard.pages import DashboardContext, build_routes
from policies.edit_site import make_default_site

OWN = "http://127.0.0.1:8000"


async def _never(asked: AskedPrompt, max_tokens: int) -> AnswerPair:
    raise AssertionError("nobody should be asked")


def by_daemon(home: Home) -> Callable[[AskedPrompt, int], Any]:
    """Both answers as the running daemon gives them."""

    async def ask(asked: AskedPrompt, max_tokens: int) -> AnswerPair:
        given = {"max_tokens": max_tokens, "base": True, "explain": True}
        given |= {"messages": asked.messages} if asked.is_chat else {"prompt": asked.text}
        reply = send_request(home.socket_file, "ask", given)
        fired = tuple(f["fact"] for f in reply["fired"] if f["score"] is not None)
        answer, base = reply["answer"], reply["base_answer"]
        return AnswerPair(answer, base, reply["generation"], fired)

    return ask


def application(
    home: Home,
    token: str | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    **changed: Any,
) -> Starlette:
    """The pages of a home, and nothing beside them."""
    limits = make_thresholds(Config(), make_default_site(4))
    known: dict[str, Any] = {"get_thresholds": lambda: limits, "ask_both": _never, "environ": {}}
    return Starlette(
        routes=build_routes(DashboardContext(home, clock=clock, **known | changed), token)
    )


def browser(home: Home, token: str | None = None, **changed: Any) -> TestClient:
    """A client that keeps cookies and follows redirections."""
    return TestClient(application(home, token, **changed), base_url=OWN)


def form_token(page: str) -> str:
    """What a page's forms carry."""
    found = re.search(r'name="form_token" value="([^"]*)"', page)
    assert found is not None, page
    return found[1]


def send(client: TestClient, path: str, page: str, **fields: str) -> Any:
    """Send a form of a page that was got from `page`, as a browser does."""
    fields["form_token"] = form_token(client.get(page).text)
    return client.post(path, data=fields, headers={"Origin": OWN})


def text_of(page: str) -> str:
    """What a person reads."""
    body = re.sub(r"<(script|style|title|desc)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())
