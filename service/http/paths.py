"""One form for each path, which rules here and rules of a proxy can both compare."""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

_ENCODED_UNRESERVED = re.compile("%(?:2[DE]|3[0-9]|4[1-9A-F]|5[0-9AF]|6[1-9A-F]|7[0-9AE])", re.IGNORECASE)
_NOT_PLAIN = re.compile("[^A-Za-z0-9/._~-]")
_LOGGED = 100  # characters


class OnePath:
    """Gives a request the one form of its path. The rules and the routes inside compare that as text.

    An unreserved character is the same, encoded or not, and is decoded here. A reserved one is not: `%2F` is no slash.
    Slashes and dots stay as they were sent, so `//metrics` and `/./metrics` are nowhere. RFC 3986, 2.3 and 6.2.2.2.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            root = scope.get("root_path", "")
            sent = scope["raw_path"].decode("ascii").removeprefix(root)
            scope = {**scope, "path": root + one_form(sent)}
        await self._app(scope, receive, send)


def one_form(path: str) -> str:
    """A path with its unreserved characters decoded."""
    return _ENCODED_UNRESERVED.sub(lambda encoded: chr(int(encoded[0][1:], 16)), path)


def loggable(path: str) -> str:
    """As much of a path as can be logged: a mistyped address may hold a query, and with it a prompt or a key."""
    plain = path[:_LOGGED]
    if strange := _NOT_PLAIN.search(plain):
        plain = plain[: strange.start()]
    return plain if plain == path else f"{plain}…"
