"""The way to a server: direct or through the environment's proxy, and the certificates to trust.

httpx also reads HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE and SSL_CERT_DIR. But httpx reads all of
them for every address, uses proxies for servers on this machine, and raises errors that name no variable.
"""

import importlib.util
import ipaddress
import os
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.request import getproxies

import httpx

from stepwise.errors import Unreachable

_EXCEPTION = re.compile(r"(?:(?P<scheme>\w+)://)?(?:\[(?P<v6>[^]]*)\]|(?P<name>[^:\[\]]*))(?::(?P<port>\d+))?")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Way:
    """The way to a server.

    Attributes:
        tls: the trusted certificates; none, if the way has no TLS.
        proxy: None for a direct connection.
        variable: of the environment, with the proxy's address.
    """

    tls: ssl.SSLContext
    proxy: httpx.Proxy | None = None
    variable: str | None = None


def way_to(url: httpx.URL) -> Way:
    """The way to a server, by the environment. A server on this machine always gets a direct connection.

    Raises:
        Unreachable: names the variable that cannot be used.
    """
    proxies = getproxies()
    kind = next((kind for kind in (url.scheme, "all") if proxies.get(kind)), None)
    if kind is None or is_loopback(url.host) or is_excepted(url, proxies.get("no", "")):
        return Way(_tls(url.scheme == "https"))
    variable = _variable(kind)
    proxy = _proxy(variable, proxies[kind].strip())
    tls = _tls("https" in (url.scheme, proxy.url.scheme))
    if proxy.url.scheme == "https":
        proxy = httpx.Proxy(proxy.url, auth=proxy.auth, ssl_context=tls)
    return Way(tls, proxy, variable)


def is_loopback(host: str) -> bool:
    """Whether a host name means this machine: localhost, 127.0.0.0/8, ::1, or the unspecified address."""
    name = host.lower().removesuffix(".")
    address = _address(host)
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if address is None:
        return name == "localhost" or name.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def is_excepted(url: httpx.URL, no_proxy: str) -> bool:
    """Whether NO_PROXY names a host, by curl's rules: by *, its domain, its address or its network.

    An entry may have a scheme and a port. Unreadable entries are ignored.
    """
    address, host = _address(url.host), url.host.lower().removesuffix(".")
    for entry in re.split(r"[,\s]+", no_proxy.lower()):
        read = _EXCEPTION.fullmatch(entry.rstrip("/"))
        scheme, v6, name, port = read.group("scheme", "v6", "name", "port") if read else (None, entry, None, None)
        if scheme not in (None, "all", url.scheme) or (port and int(port[:6]) != _port(url)):
            continue
        named = v6 or name or ""
        domain = named.removeprefix("*").strip(".")
        if named == "*" or _contains(named, address):
            return True
        if domain and address is None and (host == domain or host.endswith(f".{domain}")):
            return True
    return False


def _contains(network: str, address: Address | None) -> bool:
    if address is None:
        return False
    try:
        return address in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False


def _address(host: str) -> Address | None:
    """The address in a host, also in the short forms of connect(), such as 127.1. None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, ValueError):
        return None


def _port(url: httpx.URL) -> int:
    return url.port or {"http": 80, "https": 443}[url.scheme]


def _variable(kind: str, environment: Mapping[str, str] = os.environ) -> str:
    """The variable that `getproxies` has read. It prefers names in small letters."""
    names = [name for name, value in environment.items() if value and name.lower() == f"{kind}_proxy"]
    return min(names, key=lambda name: name != name.lower(), default=f"the system's {kind} proxy")


def _proxy(variable: str, value: str) -> httpx.Proxy:
    said = f"{variable}={re.sub('//.*@', '//', value)}"  # without its password
    more = "; NO_PROXY can name hosts that need none"
    try:
        url = httpx.URL(value if "://" in value else f"http://{value}")
        usable = bool(url.host) and (url.port is None or 0 < url.port < 65536)
    except (httpx.InvalidURL, ValueError) as error:
        raise Unreachable(f"{said} cannot be used: {error}{more}") from None
    if url.scheme not in ("http", "https", "socks5", "socks5h") or not usable:
        raise Unreachable(f"{said} cannot be used: a proxy is http:// or https://, a host and a port{more}")
    if url.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise Unreachable(f"{said} needs a package that is not installed: pip install 'httpx[socks]'{more}")
    return httpx.Proxy(url)


def _tls(needed: bool) -> ssl.SSLContext:
    """The trusted certificates: from SSL_CERT_FILE or SSL_CERT_DIR, else from certifi."""
    if not needed:
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody
    source = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), None)
    used = {name: os.environ[name] for name in (source, "SSLKEYLOGFILE") if name and os.environ.get(name)}
    said = " or ".join(f"{name}={value}" for name, value in used.items())
    if source == "SSL_CERT_DIR" and not any(Path(folder).is_dir() for folder in used[source].split(os.pathsep)):
        raise Unreachable(f"{source}={used[source]} cannot be used: it is no folder")
    try:
        return httpx.create_ssl_context()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise Unreachable(f"{said or 'the certificates'} cannot be used: {why}") from None
