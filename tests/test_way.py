"""The connection to a server: proxies and certificates of the environment, for both clients and the command line."""

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from stepwise import AsyncClient, Client, Unreachable
from stepwise.cli import exits
from stepwise.way import is_excepted, is_loopback, way_to
from tests.peers import forwarding
from tests.programs import done, refused, stepwise
from tests.servers import ServerProcess

ELSEWHERE = "http://stepwise.example:8000"  # a name that does not exist
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper() in VARIABLES:
            monkeypatch.delenv(name)


def info_of(url: str) -> list[Any]:
    """The answers to both clients."""

    async def ask() -> Any:
        async with AsyncClient(url, patience_s=0) as client:
            return await client.info()

    with Client(url, patience_s=0) as client:
        return [client.info(), asyncio.run(ask())]


BROKEN = {
    "HTTP_PROXY": "http://[",
    "HTTPS_PROXY": "http://a:no-port",
    "ALL_PROXY": "socks://127.0.0.1:1080/",
    "NO_PROXY": "[::1],::1,http://[,:,*,[,]",
    "SSL_CERT_FILE": "/nowhere/at/all",
    "SSL_CERT_DIR": "/nowhere/at/all",
    "SSLKEYLOGFILE": "/nowhere/at/all",
}


@pytest.mark.parametrize("name", [*BROKEN, "all_proxy", "https_proxy", "http_proxy"])
def test_nothing_in_the_environment_breaks_the_way_to_this_machine(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Neither broken settings nor a proxy that would be used."""
    for value in (BROKEN[name.upper()], "http://127.0.0.1:9"):
        monkeypatch.setenv(name, value)
        for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
            assert {info["fingerprint"] for info in info_of(url)} == {server.client.get("/info").json()["fingerprint"]}


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_other_servers_are_asked_through_the_proxy(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    with forwarding(server) as proxy:
        for value in (proxy.url, proxy.url.removeprefix("http://"), f" {proxy.url} "):
            monkeypatch.setenv(name, value)
            assert [info["model"]["name"] for info in info_of(ELSEWHERE)] == ["grey", "grey"]
        assert done(stepwise(None, tmp_path, "sample", "-s", "5", "--url", ELSEWHERE)) == "5.png\n"
    assert proxy.asked[0] == f"GET {ELSEWHERE}/info HTTP/1.1"
    assert proxy.asked[-1] == f"POST {ELSEWHERE}/sample HTTP/1.1"


def test_the_nearest_variable_is_used_and_no_other_is_read(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1080")
    monkeypatch.setenv("HTTPS_PROXY", "http://[")
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    with forwarding(server) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        assert len(info_of(ELSEWHERE)) == 2


UNUSABLE = [
    ("ALL_PROXY", "socks://127.0.0.1:1080/", ELSEWHERE),
    ("all_proxy", "socks4://127.0.0.1:1080", ELSEWHERE),
    ("HTTP_PROXY", "ftp://127.0.0.1", ELSEWHERE),
    ("HTTP_PROXY", "http://", ELSEWHERE),
    ("HTTP_PROXY", ":3128", ELSEWHERE),
    ("HTTP_PROXY", "http://a:99999", ELSEWHERE),
    ("HTTP_PROXY", "http://xn--", ELSEWHERE),
    ("HTTPS_PROXY", "http://proxy:port", "https://stepwise.example"),
    ("HTTPS_PROXY", "http://me:secret@[::1", "https://stepwise.example"),
    ("SSL_CERT_FILE", "/nowhere/at/all", "https://127.0.0.1:9"),
    ("SSL_CERT_FILE", os.devnull, "https://127.0.0.1:9"),
    ("SSL_CERT_FILE", "/", "https://127.0.0.1:9"),
    ("SSL_CERT_DIR", "/nowhere/at/all", "https://127.0.0.1:9"),
    ("SSLKEYLOGFILE", "/nowhere/at/all", "https://127.0.0.1:9"),
]


@pytest.mark.parametrize(("name", "value", "url"), UNUSABLE)
def test_what_cannot_be_used_is_told_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, url: str
) -> None:
    monkeypatch.setenv(name, value)
    for kind in (Client, AsyncClient):
        with pytest.raises(Unreachable, match=rf"^{name}=.* cannot be used: "):
            kind(url)
    line = refused(stepwise(None, tmp_path, "verify", "a.png", "--url", url), exits.UNUSABLE)
    assert line.startswith(f"--url {url}: {name}=")
    assert "secret" not in line


def test_socks_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://me:secret@127.0.0.1:1080")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(Unreachable, match=r"^ALL_PROXY=socks5://127.0.0.1:1080 needs a package .*httpx\[socks\]"):
        Client(ELSEWHERE)


@pytest.mark.parametrize("url", [ELSEWHERE, "https://stepwise.example"])
def test_a_proxy_that_is_not_there_is_told_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    for ask in (Client(url).info, lambda: asyncio.run(AsyncClient(url).info())):
        with pytest.raises(Unreachable, match=f"^no connection to {url} through the proxy that ALL_PROXY names: "):
            ask()
    assert "ALL_PROXY" in refused(stepwise(None, tmp_path, "info", "--url", url), exits.UNREACHABLE)


def test_a_proxy_that_refuses_is_told(server: ServerProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with forwarding(server) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        line = refused(stepwise(None, tmp_path, "info", "--url", "https://stepwise.example"), exits.UNREACHABLE)
    assert "through the proxy that HTTPS_PROXY names: 407 Proxy Authentication Required" in line
    assert len(proxy.asked) == 1


def test_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    url = httpx.URL(ELSEWHERE)
    assert way_to(url).variable == "ALL_PROXY"
    monkeypatch.setenv("NO_PROXY", "other, .example")
    assert way_to(url).proxy is None


@pytest.mark.parametrize(
    ("url", "no_proxy", "expected"),
    [
        ("http://a.example.com", "example.com", True),
        ("http://a.example.com", ".example.com", True),
        ("http://example.com", ".example.com", True),
        ("http://a.example.com", "*.example.com", True),
        ("http://A.Example.com.", "EXAMPLE.com", True),
        ("http://badexample.com", "example.com", False),
        ("http://a.example.com", "b, *", True),
        ("http://a.example.com", "b *", True),
        ("http://a.example.com:8000", "a.example.com:8000", True),
        ("http://a.example.com:8000", "a.example.com:80", False),
        ("http://a.example.com", "a.example.com:80", True),
        ("http://a.example.com", "http://a.example.com", True),
        ("http://a.example.com", "https://a.example.com", False),
        ("http://10.1.2.3", "10.1.2.3", True),
        ("http://10.1.2.3", "10.0.0.0/8", True),
        ("http://11.1.2.3", "10.0.0.0/8", False),
        ("http://10.1.2.3", "2.3", False),
        ("http://[fd00::1]:8000", "[fd00::1]", True),
        ("http://[fd00::1]:8000", "fd00:0::1", True),
        ("http://[fd00::1]:8000", "fd00::/8", True),
        ("http://[fd00::1]:8000", "[fd00::1]:8000", True),
        ("http://[fd00::1]:8000", "[fd00::1]:80", False),
        ("http://10.1.2.3", "[, ], http://[, :, ::, /, 10.0.0.0/99, a:b:c, 🙂", False),
        ("http://a.example.com", "", False),
        ("http://a.example.com", "., .., *., ,", False),
        pytest.param("http://a.example.com", "a.example.com:" + "9" * 5000, False, id="a long port"),
    ],
)
def test_hosts_that_need_no_proxy(url: str, no_proxy: str, expected: bool) -> None:
    assert is_excepted(httpx.URL(url), no_proxy) is expected


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.9.9.9", "127.1", "::1", "::ffff:127.0.0.1", "0.0.0.0"],
)
def test_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["10.0.0.1", "localhost.example", "128.0.0.1", "fd00::1", "::2", "notlocalhost"])
def test_other_machines(host: str) -> None:
    assert not is_loopback(host)
