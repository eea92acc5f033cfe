"""Sign-in to the dashboard, and the protection of its forms (CSRF).

It knows nothing of what the pages show.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import Response

from kedit_daemon.serve.access import RateLimiter
from kedit_daemon.serve.hosts import is_safe_host, is_same_origin
from kedit_daemon.serve.request_body import read_body
from memory.errors import BadRequest, KeditError

SESSION_COOKIE, NONCE_COOKIE = "kedit_session", "kedit_form"
TOKEN_FIELD = "form_token"
SESSION_LENGTH = timedelta(hours=12)
MAX_WRONG_TOKENS = 10  # of one client in a minute
MAX_SESSIONS = 100  # at once; a new one ends the oldest
MAX_FORM_BYTES, MAX_FORM_FIELDS = 64 << 10, 20
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self';"
    " img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Not `no-referrer`: with that, browsers name no origin when they send a form.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class SessionGuard:
    """Sessions and form tokens. Both end with the process."""

    def __init__(
        self,
        token: str | None,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Sign-in takes `token`; None: there is no sign-in."""
        self._token, self._clock = token, clock
        self._wrong_tokens = RateLimiter(MAX_WRONG_TOKENS, monotonic)
        self._secret = secrets.token_bytes(32)
        self._sessions: dict[str, datetime] = {}  # cookie -> end, the oldest first

    @property
    def needs_sign_in(self) -> bool:
        """Return whether people have to sign in."""
        return self._token is not None

    def check_host(self, request: Request) -> None:
        """Refuse a host name that anybody may have pointed here (DNS rebinding), where no sign-in
        protects the pages."""
        host = request.headers.get("host", "")
        if not self.needs_sign_in and not is_safe_host(host, loopback_only=False):
            raise KeditError(
                f"without a token these pages are not served as {host!r}",
                code="host",
                hint="open them by the address of the machine, such as 127.0.0.1",
            )

    # Sessions -----------------------------------------------------------------------------------

    def is_signed_in(self, request: Request) -> bool:
        """Return whether a request may see and do everything."""
        if not self.needs_sign_in:
            return True
        end = self._sessions.get(request.cookies.get(SESSION_COOKIE, ""))
        return end is not None and self._clock() < end

    def sign_in_delay(self, request: Request) -> int:
        """Return the seconds until a token of this client is checked: too many were wrong."""
        return self._wrong_tokens.check_rate(_client_host(request), take=False)

    def sign_in(self, request: Request, given: str, response: Response) -> bool:
        """Begin a session if the token is right. Check `sign_in_delay` first."""
        # Digests: the comparison does not even show the token's length.
        digests = (hashlib.sha256(t.encode()).digest() for t in (given, self._token or ""))
        if not self.needs_sign_in or not hmac.compare_digest(*digests):
            self._wrong_tokens.check_rate(_client_host(request))
            return False
        session = secrets.token_urlsafe(32)
        while len(self._sessions) >= MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        self._sessions[session] = self._clock() + SESSION_LENGTH
        self._set_cookie(request, response, SESSION_COOKIE, session)
        return True

    def sign_out(self, request: Request, response: Response) -> None:
        """End the session, on the server and in the browser."""
        self._sessions.pop(request.cookies.get(SESSION_COOKIE, ""), None)
        response.delete_cookie(SESSION_COOKIE, httponly=True, samesite="strict")

    # Forms --------------------------------------------------------------------------------------

    def get_nonce(self, request: Request) -> str:
        """Return the browser's nonce, from which the tokens of its forms are made."""
        return request.cookies.get(NONCE_COOKIE) or secrets.token_urlsafe(16)

    def keep_nonce(self, request: Request, response: Response, nonce: str) -> None:
        """Give the browser its nonce, if it has none yet."""
        if NONCE_COOKIE not in request.cookies:
            self._set_cookie(request, response, NONCE_COOKIE, nonce)

    def make_form_token(self, request: Request, nonce: str) -> str:
        """Return the token of a form: nobody else can make it, and it is valid in one session."""
        owner = f"{nonce}\n{request.cookies.get(SESSION_COOKIE, '')}".encode()
        return hmac.new(self._secret, owner, hashlib.sha256).hexdigest()

    async def read_form(self, request: Request) -> dict[str, str]:
        """Read the fields of a form; refuse one that was not sent from these pages."""
        if not is_same_origin(request.headers):
            raise _foreign_form_error("the form was sent from another page")
        fields = await _read_fields(request)
        nonce = request.cookies.get(NONCE_COOKIE, "")
        wanted, given = self.make_form_token(request, nonce), fields.pop(TOKEN_FIELD, "")
        if not nonce or not hmac.compare_digest(wanted.encode(), given.encode()):
            raise _foreign_form_error("the form is too old, or was not made here")
        return fields

    def _set_cookie(self, request: Request, response: Response, name: str, value: str) -> None:
        secure = request.scope["scheme"] == "https"
        response.set_cookie(name, value, httponly=True, samesite="strict", secure=secure)


def _client_host(request: Request) -> str:
    return request.client.host if request.client else ""


def _foreign_form_error(message: str) -> KeditError:
    return KeditError(
        message, code="foreign-form", hint="open the page again, and press its button there"
    )


async def _read_fields(request: Request) -> dict[str, str]:
    try:
        text = (await read_body(request, MAX_FORM_BYTES)).decode("ascii")
        pairs = parse_qsl(
            text, keep_blank_values=True, max_num_fields=MAX_FORM_FIELDS, errors="strict"
        )
    except ValueError as error:
        raise BadRequest(f"the form cannot be read: {error}") from error
    # Browsers send the line breaks of a text box as two characters.
    return {name: value.replace("\r\n", "\n") for name, value in pairs}
