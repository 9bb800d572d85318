"""API keys: which requests may pass, and which client sends a request."""

import hmac
import ipaddress
from collections.abc import Collection, Sequence
from functools import lru_cache

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Unauthorized
from service.http.paths import path_of
from service.http.problems import answer


class ApiKeys:
    """Lets requests with `Authorization: Bearer KEY` pass, and every request for an open path."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in self._open_paths:
            await self._app(scope, receive, send)
        elif error := self._refusal(Headers(scope=scope).get("authorization")):
            await answer(error, path_of(scope))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, authorization: str | None) -> Unauthorized | None:
        if authorization is None:
            return Unauthorized("this server needs an API key: Authorization: Bearer KEY")
        scheme, key = _split(authorization)
        sent = key.encode("latin-1")  # the bytes that the client sent
        known = [hmac.compare_digest(sent, one) for one in self._keys]
        return None if scheme.lower() == "bearer" and any(known) else Unauthorized("the API key is not known")


def client_of(scope: Scope, has_keys: bool) -> str:
    """The client of a request: its API key, or else its address. Clients share the queue and the memory.

    Args:
        has_keys: the server has API keys.
    """
    headers = Headers(scope=scope)
    if has_keys and "authorization" in headers:
        return _split(headers["authorization"])[1]  # "bearer KEY" and "Bearer KEY" are one client
    return household(scope["client"][0]) if scope.get("client") else "unknown"


def _split(authorization: str) -> tuple[str, str]:
    """Scheme and key."""
    scheme, _, key = authorization.partition(" ")
    return scheme, key.strip()


@lru_cache(maxsize=4096)
def household(host: str) -> str:
    """The whole IPv4 address, or the first 64 bits of an IPv6 address. Its owner chooses the other bits freely."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:  # a name, from a test's client or a proxy
        return host
    if address.version == 4:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
