"""Who may see the pages, and which forms were really sent from them.

It knows nothing of what the pages show.
"""

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import Response

from kedit_daemon.serve.access import Rate
from kedit_daemon.serve.hosts import host_name, place
from memory.errors import KeditError

SESSION, NONCE = "kedit_session", "kedit_form"  # cookies
TOKEN_FIELD = "form_token"
SESSION_LENGTH = timedelta(hours=12)
MOST_WRONG = 10  # tokens of one client in a minute
MOST_SESSIONS = 100  # at once; the oldest goes
FORM_BYTES, FORM_FIELDS = 64 << 10, 20
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self';"
    " img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Not `no-referrer`: with that, browsers name no origin when they send a form.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Guard:
    """Sessions and form tokens. Both die with the process."""

    def __init__(
        self,
        token: str | None,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`token`: what a person has to know to sign in; None where nobody has to."""
        self._token, self._clock = token, clock
        self._wrong = Rate(MOST_WRONG, monotonic)
        self._secret = secrets.token_bytes(32)
        self._sessions: dict[str, datetime] = {}  # by cookie, until when; the oldest first

    @property
    def locked(self) -> bool:
        """Whether people have to sign in."""
        return self._token is not None

    def check_host(self, request: Request) -> None:
        """Refuse a name that anybody may have pointed here (DNS rebinding), where no sign-in
        protects what is shown. No name server stands behind a number or localhost."""
        name = host_name(request.headers.get("host", ""))
        if self.locked or name == "localhost":
            return
        try:
            ipaddress.ip_address(name)
        except ValueError:
            raise KeditError(
                f"without a token these pages are not served as {name!r}",
                code="host",
                hint="open them by the address of the machine, such as 127.0.0.1",
            ) from None

    # Sessions -----------------------------------------------------------------------------------

    def signed_in(self, request: Request) -> bool:
        """Whether the request may see and do everything."""
        if not self.locked:
            return True
        until = self._sessions.get(request.cookies.get(SESSION, ""))
        return until is not None and self._clock() < until

    def held_back(self, request: Request) -> int:
        """Seconds for which no token of this client is looked at: too many were wrong."""
        return self._wrong.wait(_client(request), take=False)

    def sign_in(self, request: Request, given: str, response: Response) -> bool:
        """Begin a session, if the token is right. Ask `held_back` first."""
        digests = (hashlib.sha256(t.encode()).digest() for t in (given, self._token or ""))
        if not self.locked or not hmac.compare_digest(*digests):
            self._wrong.wait(_client(request))
            return False
        session = secrets.token_urlsafe(32)
        while len(self._sessions) >= MOST_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        self._sessions[session] = self._clock() + SESSION_LENGTH
        self._keep(request, response, SESSION, session)
        return True

    def sign_out(self, request: Request, response: Response) -> None:
        """End the session, here and in the browser."""
        self._sessions.pop(request.cookies.get(SESSION, ""), None)
        response.delete_cookie(SESSION, httponly=True, samesite="strict")

    # Forms --------------------------------------------------------------------------------------

    def nonce(self, request: Request) -> str:
        """The browser's own number, which the token of every form is made from."""
        return request.cookies.get(NONCE) or secrets.token_urlsafe(16)

    def keep_nonce(self, request: Request, response: Response, nonce: str) -> None:
        """Let the browser keep its number, if it has none yet."""
        if NONCE not in request.cookies:
            self._keep(request, response, NONCE, nonce)

    def form_token(self, request: Request, nonce: str) -> str:
        """What a form has to carry: nobody else can make it, and it fits one session."""
        said = f"{nonce}\n{request.cookies.get(SESSION, '')}".encode()
        return hmac.new(self._secret, said, hashlib.sha256).hexdigest()

    async def form(self, request: Request) -> dict[str, str]:
        """The fields of a form that one of these pages has sent. KeditError: another has."""
        origin = place(request.headers.get("origin", ""))
        # The scheme is left out: a proxy in front may be the one who speaks TLS.
        if not origin or origin != request.headers.get("host"):
            raise _foreign("the form was sent from another page")
        fields = await _fields(request)
        nonce = request.cookies.get(NONCE, "")
        wanted, given = self.form_token(request, nonce), fields.pop(TOKEN_FIELD, "")
        if not nonce or not hmac.compare_digest(wanted.encode(), given.encode()):
            raise _foreign("the form is too old, or was not made here")
        return fields

    def _keep(self, request: Request, response: Response, name: str, value: str) -> None:
        secure = request.scope["scheme"] == "https"
        response.set_cookie(name, value, httponly=True, samesite="strict", secure=secure)


def _client(request: Request) -> str:
    return request.client.host if request.client else ""


def _foreign(message: str) -> KeditError:
    return KeditError(
        message, code="foreign-form", hint="open the page again, and press its button there"
    )


async def _fields(request: Request) -> dict[str, str]:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > FORM_BYTES:
            raise KeditError(
                f"the form is longer than {FORM_BYTES} bytes", code="too-large", hint="send less"
            )
    try:
        text = body.decode("ascii")
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=FORM_FIELDS, errors="strict")
    except ValueError as error:
        raise KeditError(f"the form cannot be read: {error}", code="bad-request") from error
    # Browsers send the line breaks of a text box as two characters.
    return {name: value.replace("\r\n", "\n") for name, value in pairs}
