"""Cross-origin requests: pages and apps in browsers that may use the API."""

from collections.abc import Collection

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

SHOWN_HEADERS = ("Retry-After", "x-kedit-facts", "x-kedit-generation")
API_PATHS = ("/facts", "/v1/")  # with GET, /facts is a page of the dashboard


class ApiCors:
    """Answers the preflights of allowed origins, and lets them read the API's answers. The pages of
    the dashboard are nobody else's."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self.app = app
        self.cors = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # OpenAI's client sends a dozen of its own
            # A page from elsewhere that was allowed may come to a server on this machine.
            allow_private_network=True,
            expose_headers=SHOWN_HEADERS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        is_api = scope["type"] == "http" and scope["path"].startswith(API_PATHS)
        is_page = is_api and scope["path"].startswith("/facts") and scope["method"] == "GET"
        await (self.cors if is_api and not is_page else self.app)(scope, receive, send)
