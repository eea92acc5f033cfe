"""What goes wrong, as OpenAI's servers say it: {"error": {message, type, param, code}}."""

from starlette.responses import JSONResponse

from memory.errors import KeditError

RETRY_SECONDS = 1
# Of errors that say nothing of HTTP themselves.
_STATUS_BY_CODE = {"busy": 429, "too-long": 400, "model": 404, "too-large": 413, "usage": 400}
_STATUS_BY_CODE |= {
    "bad-request": 400,
    "not-running": 503,
    "stopping": 503,
    "timeout": 503,
    "unreadable": 503,
}
_OPENAI_CODES = {"too-long": "context_length_exceeded", "model": "model_not_found"}
_PARAM_BY_CODE = {"model": "model", "usage": "format"}


class RequestError(KeditError):
    """A request that is not answered. `param` is the field that is at fault, if one is."""

    exit_code = 1

    def __init__(
        self, message: str, *, status: int, code: str, param: str | None = None, retry: int = 0
    ) -> None:
        """retry: after so many seconds it may be tried again."""
        super().__init__(message, code=code)
        self.status, self.param, self.retry_after = status, param, retry


def bad_request(message: str, param: str | None = None) -> RequestError:
    """A request that no server of this kind would answer."""
    return RequestError(message, status=400, code="bad-request", param=param)


def as_request_error(error: KeditError) -> RequestError:
    """Any error of ours, with what HTTP wants to know of it."""
    if isinstance(error, RequestError):
        return error
    status = _STATUS_BY_CODE.get(error.code, 500)
    return RequestError(
        f"{error}: {error.hint}" if error.hint else str(error),
        status=status,
        code=_OPENAI_CODES.get(error.code, error.code),
        param=_PARAM_BY_CODE.get(error.code),
        retry=RETRY_SECONDS if status in (429, 503) else 0,
    )


def error_body(error: KeditError) -> dict[str, object]:
    """What is said of an error, in OpenAI's form."""
    refused = as_request_error(error)
    kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
    return {
        "error": {
            "message": str(refused),
            "type": kinds.get(refused.status, "invalid_request_error"),
            "param": refused.param,
            "code": refused.code.replace("-", "_"),
        }
    }


def error_response(error: KeditError, **more: object) -> JSONResponse:
    """The answer that a request gets instead; `more` stands beside the error."""
    refused = as_request_error(error)
    headers = {"Retry-After": str(refused.retry_after)} if refused.retry_after else {}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(refused) | more, refused.status, headers)
