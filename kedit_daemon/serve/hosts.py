"""Where a request says that it goes and comes from; nothing where that is no address."""

from urllib.parse import urlsplit


def parse_host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def parse_origin_host(origin: str) -> str:
    """The name and the port in an Origin header: where it is this server, what Host says."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
