"""API keys: which requests may pass, and which client sends a request."""

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Collection, Sequence
from functools import lru_cache

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Unauthorized
from service.http.paths import path_of
from service.http.problems import answer

# Makes browsers ask for name and password.
_LOGIN = 'Basic realm="Stepwise: any name, and an API key as the password", charset="UTF-8"'


class ApiKeys:
    """Lets requests with a key pass, and every request for an open path.

    A key comes as `Authorization: Bearer KEY`, or by HTTP Basic as the password of any user. RFC 6750, RFC 7617.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in self._open_paths:
            await self._app(scope, receive, send)
        elif error := self._refusal(Headers(scope=scope).get("authorization")):
            response = answer(error, path_of(scope))
            if Headers(scope=scope).get("sec-fetch-dest") != "empty":  # a page that fetches asks for the key itself
                response.headers.append("WWW-Authenticate", _LOGIN)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, authorization: str | None) -> Unauthorized | None:
        if authorization is None:
            return Unauthorized("this server needs an API key: Authorization: Bearer KEY")
        key = _key(authorization)
        sent = key.encode("latin-1")  # the bytes that the client sent
        known = [hmac.compare_digest(sent, one) for one in self._keys]
        return None if any(known) else Unauthorized("the API key is not known")


def client_of(scope: Scope, has_keys: bool) -> str:
    """The client of a request: its API key, or else its address. Clients share the queue and the memory.

    Args:
        has_keys: the server has API keys.
    """
    headers = Headers(scope=scope)
    if has_keys and "authorization" in headers:
        return _key(headers["authorization"])  # one client, in whichever way it sends its key
    return household(scope["client"][0]) if scope.get("client") else "unknown"


def _key(authorization: str) -> str:
    """The key in an Authorization header. Empty, as no key is, for a scheme or a form that carries none."""
    scheme, _, credentials = authorization.partition(" ")
    credentials = credentials.strip()
    match scheme.lower():
        case "bearer":
            return credentials
        case "basic":
            return _password(credentials)
        case _:
            return ""


def _password(credentials: str) -> str:
    """The password in the credentials of HTTP Basic: base64 of NAME:PASSWORD."""
    try:
        decoded = base64.b64decode(credentials, validate=True)
    except (binascii.Error, ValueError):
        return ""
    return decoded.partition(b":")[2].decode("latin-1")


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
