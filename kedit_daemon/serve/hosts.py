"""Checks of the Host and Origin headers, against DNS rebinding and forms of other sites.

Starlette's TrustedHostMiddleware knows only a list of names, not "any address of this machine".
"""

from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers


def is_safe_host(host: str, *, loopback_only: bool) -> bool:
    """Check that a Host header names localhost or an IP address: no name server can point these
    here from elsewhere."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback or not loopback_only
    except ValueError:
        return False


def is_same_origin(headers: Headers) -> bool:
    """Check that the Origin header names the host and port of the Host header.

    The scheme is left out: a proxy in front may be the one that speaks TLS.
    """
    try:
        origin = urlsplit(headers.get("origin", "")).netloc
    except ValueError:
        return False
    return origin != "" and origin == headers.get("host")
