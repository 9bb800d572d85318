"""One form for each path, so that a proxy's rules and this server's rules compare the same text."""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

_ENCODED_UNRESERVED = re.compile("%(?:2[DE]|3[0-9]|4[1-9A-F]|5[0-9AF]|6[1-9A-F]|7[0-9AE])", re.IGNORECASE)
_NOT_PLAIN = re.compile("[^A-Za-z0-9/._~-]")
_LOGGED = 100  # characters


class OnePath:
    """Gives each request the one form of its path. Later rules and routes compare paths as text.

    Encoded unreserved characters are decoded, because both forms mean the same. Encoded reserved characters stay
    encoded, because `%2F` is no slash. Slashes and dots stay too, so `//metrics` and `/./metrics` are not found.
    RFC 3986, sections 2.3 and 6.2.2.2.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            root = scope.get("root_path", "")
            sent = scope["raw_path"].decode("ascii").removeprefix(root)
            scope = {**scope, "path": root + one_form(sent)}
        await self._app(scope, receive, send)


def path_of(scope: Scope) -> str:
    """The path of a request, without the prefix under which a proxy serves this server."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def pattern_of(scope: Scope) -> str:
    """The path of the route that took a request, with `{names}` for its parts that vary. Empty without a route."""
    return getattr(scope.get("route"), "path_format", "")


def one_form(path: str) -> str:
    """A path with its unreserved characters decoded."""
    return _ENCODED_UNRESERVED.sub(lambda encoded: chr(int(encoded[0][1:], 16)), path)


def loggable(path: str) -> str:
    """The part of a path that may be logged. A mistyped address may contain a query with a prompt or a key."""
    plain = path[:_LOGGED]
    if strange := _NOT_PLAIN.search(plain):
        plain = plain[: strange.start()]
    return plain if plain == path else f"{plain}…"
