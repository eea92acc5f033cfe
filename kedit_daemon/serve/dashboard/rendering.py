"""The frame of the dashboard: from a function that returns a page to an endpoint that sends it.

Every text on a page is cleaned of control characters and escaped, whoever wrote it.
"""

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from inspect import iscoroutinefunction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from kedit_daemon.report.render import (
    format_bytes,
    format_duration,
    format_figures,
    format_statement,
    format_time,
)
from kedit_daemon.report.worddiff import diff_words
from kedit_daemon.serve.dashboard.login import SECURITY_HEADERS, SessionGuard
from kedit_daemon.serve.disconnect import CLIENT_GONE, run_unless_gone
from kedit_daemon.serve.errors import status_of
from kedit_daemon.system.sanitize import clean_text
from memory.db.queries import fetch_fact_detail
from memory.errors import KeditError

if TYPE_CHECKING:
    import sqlite3

DASHBOARD_FOLDER = Path(__file__).parent
REFUSED_STATUS = 409  # of errors without a status of their own


@dataclass(frozen=True)
class PageRequest:
    """The parameters of a request, and the fields of its form."""

    path: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    form: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DashboardPage:
    """A template and its context."""

    template: str
    title: str
    context: Mapping[str, Any] = field(default_factory=dict)
    status: int = 200


Handler = (
    Callable[[PageRequest], DashboardPage]
    | Callable[[PageRequest], Coroutine[Any, Any, DashboardPage]]
)
Endpoint = Callable[[Request], Awaitable[Response]]


class PageFrame:
    """The frame around every page: its sign-in, rendering and headers."""

    def __init__(self, guard: SessionGuard, clock: Callable[[], datetime], program: str) -> None:
        """program: the command line for this home."""
        self.guard, self._clock = guard, clock
        self._templates = _build_environment(program)

    def page_route(self, path: str, handler: Handler, method: str = "GET") -> BaseRoute:
        """Return the route of a page. A handler that is no coroutine runs in a thread."""

        async def endpoint(request: Request) -> Response:
            if not self.guard.is_signed_in(request):
                return self._redirect_to_sign_in(request)
            form = await self.guard.read_form(request) if method == "POST" else {}
            parameters = PageRequest(request.path_params, dict(request.query_params), form)
            if iscoroutinefunction(handler):
                page: DashboardPage | None = await run_unless_gone(request, handler(parameters))
                if page is None:
                    return Response(status_code=CLIENT_GONE)
            else:
                show = cast(Callable[[PageRequest], DashboardPage], handler)
                page = await run_in_threadpool(show, parameters)
            return self._render_page(request, page)

        return Route(path, self._guard_endpoint(endpoint), methods=[method])

    def fixed_routes(self) -> list[BaseRoute]:
        """Return the routes that need no sign-in: sign-in and sign-out, style and script."""
        static = _SafeStaticFiles(directory=DASHBOARD_FOLDER / "static")
        return [
            Route("/sign-in", self._guard_endpoint(self._sign_in), methods=["GET", "POST"]),
            Route("/sign-out", self._guard_endpoint(self._sign_out), methods=["POST"]),
            Mount("/static", static, name="static"),
        ]

    def _guard_endpoint(self, endpoint: Endpoint) -> Endpoint:
        async def guarded(request: Request) -> Response:
            try:
                self.guard.check_host(request)
                response = await endpoint(request)
            except KeditError as error:
                response = self._render_page(request, error_page(error))
            response.headers.update({**SECURITY_HEADERS, "Cache-Control": "no-store"})
            return response

        return guarded

    def _render_page(self, request: Request, page: DashboardPage) -> Response:
        nonce = self.guard.get_nonce(request)
        content = self._templates.get_template(page.template).render(
            **page.context,
            title=page.title,
            now=self._clock(),
            form_token=self.guard.make_form_token(request, nonce),
            signed_in=self.guard.is_signed_in(request),
            locked=self.guard.needs_sign_in,
            here=request.scope["path"],
        )
        response = HTMLResponse(content, page.status)
        self.guard.keep_nonce(request, response, nonce)
        return response

    # Signing in and out -------------------------------------------------------------------------

    def _redirect_to_sign_in(self, request: Request) -> Response:
        """Redirect to the sign-in, which leads back to this page; a form is not kept."""
        # Not request.url, which is made from Host, and that may be anything.
        wanted = request.scope["path"]
        if query := request.scope["query_string"].decode("latin-1"):
            wanted += f"?{query}"
        back = f"?next={quote(wanted)}" if request.method == "GET" else ""
        return RedirectResponse(f"/sign-in{back}", 303)

    async def _sign_in(self, request: Request) -> Response:
        form = await self.guard.read_form(request) if request.method == "POST" else None
        wanted = _safe_path((form or dict(request.query_params)).get("next", "/"))
        redirect = RedirectResponse(wanted, 303)
        seconds, status = 0, 200
        if form is None:
            if self.guard.is_signed_in(request):
                return redirect
        elif seconds := self.guard.sign_in_delay(request):
            status = 429
        elif self.guard.sign_in(request, form.get("token", ""), redirect):
            return redirect
        else:
            status = 403
        context = {"wanted": wanted, "wrong": form is not None, "seconds": seconds}
        page = DashboardPage("sign_in.html", "Sign in", context, status)
        response = self._render_page(request, page)
        if seconds:
            response.headers["Retry-After"] = str(seconds)
        return response

    async def _sign_out(self, request: Request) -> Response:
        await self.guard.read_form(request)
        response = RedirectResponse("/sign-in", 303)
        self.guard.sign_out(request, response)
        return response


class _SafeStaticFiles(StaticFiles):
    """The files of a folder, sent with the security headers."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(SECURITY_HEADERS)
        return response


def error_page(error: KeditError) -> DashboardPage:
    """Return the page that shows an error and its remedy."""
    context = {"message": str(error), "hint": error.hint, "code": error.code}
    status = status_of(error, REFUSED_STATUS)
    return DashboardPage("error.html", "That did not work", context, status)


def load_fact(conn: "sqlite3.Connection", name: str) -> dict[str, Any]:
    """Return a fact by its id or its owner's; raise KeditError if there is none."""
    fact = fetch_fact_detail(conn, name)
    if fact is None:
        raise KeditError(f"there is no fact {name}", code="unknown-fact", hint="look in Facts")
    return fact


def parse_choice(
    given: Mapping[str, str], name: str, default: int, choices: tuple[int, ...]
) -> int:
    """Return the number that a form or a query gives, if it is one of the choices."""
    text = given.get(name, "")
    return next((choice for choice in choices if str(choice) == text), default)


def _safe_path(path: str) -> str:
    """Return the path if it stays on this site, else the root."""
    safe = path.startswith("/") and not path.startswith("//") and "\\" not in path
    return path if safe and path.isprintable() else "/"


def _build_environment(program: str) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(DASHBOARD_FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_clean_output,
    )
    environment.filters |= {
        "age": format_duration,
        "figures": format_figures,
        "timestamp": format_time,
        "size": format_bytes,
        "statement": format_statement,
    }
    environment.globals |= {"program": program, "word_changes": diff_words}
    return environment


def _clean_output(value: object) -> object:
    """Clean the text that a template prints, except markup of a template."""
    return value if isinstance(value, Markup) else clean_text(value, lines=True)
