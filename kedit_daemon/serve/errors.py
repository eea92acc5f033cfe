"""Errors over HTTP, in the form of OpenAI's servers: {"error": {message, type, param, code}}."""

from starlette.responses import JSONResponse

from memory.errors import KeditError

RETRY_SECONDS = 1
STATUS_BY_CODE = {
    **dict.fromkeys(("bad-request", "no-chat-template", "too-long", "usage"), 400),
    "foreign-form": 403,
    **dict.fromkeys(("model", "unknown-fact", "unknown-generation"), 404),
    "too-large": 413,
    "host": 421,
    **dict.fromkeys(("no-home", "not-running", "stopping", "timeout", "unreadable"), 503),
}
_OPENAI_CODES = {"too-long": "context_length_exceeded", "model": "model_not_found"}
_PARAM_BY_CODE = {"model": "model", "usage": "format"}


class RequestError(KeditError):
    """A request that is refused, with its HTTP status.

    param: the field that is at fault, if one is. retry: seconds after which to try again; 0: never.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, status: int, code: str, param: str | None = None, retry: int = 0
    ) -> None:
        super().__init__(message, code=code)
        self.status, self.param, self.retry_after = status, param, retry


def bad_request(message: str, param: str | None = None) -> RequestError:
    """Return the error of a request that no server of this kind would answer."""
    return RequestError(message, status=400, code="bad-request", param=param)


def status_of(error: KeditError, default: int = 500) -> int:
    """Return the HTTP status of an error; `default` for a code without one."""
    if isinstance(error, RequestError):
        return error.status
    return STATUS_BY_CODE.get(error.code, default)


def as_request_error(error: KeditError) -> RequestError:
    """Return any error as a RequestError, its hint in the message."""
    if isinstance(error, RequestError):
        return error
    status = status_of(error)
    return RequestError(
        f"{error}: {error.hint}" if error.hint else str(error),
        status=status,
        code=_OPENAI_CODES.get(error.code, error.code),
        param=_PARAM_BY_CODE.get(error.code),
        retry=RETRY_SECONDS if status == 503 else 0,
    )


def error_body(error: KeditError) -> dict[str, object]:
    """Return an error in OpenAI's form."""
    refused = as_request_error(error)
    types = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
    return {
        "error": {
            "message": str(refused),
            "type": types.get(refused.status, "invalid_request_error"),
            "param": refused.param,
            "code": refused.code.replace("-", "_"),
        }
    }


def error_response(error: KeditError, **extra: object) -> JSONResponse:
    """Return the response to a refused request; `extra` are more fields of its body."""
    refused = as_request_error(error)
    headers = {"Retry-After": str(refused.retry_after)} if refused.retry_after else {}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(refused) | extra, refused.status, headers)
