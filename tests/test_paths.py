"""Each path has one spelling: rules on paths let only that through, here and at the balancer. Others get errors."""

import asyncio
import json
import socket
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from starlette.types import ASGIApp, Message, Scope

from service.config import Settings
from service.http.app import create_app
from service.http.logs import trace_without_messages
from service.http.metrics import Metrics
from service.http.paths import loggable, one_form
from tests.balancers import balancing
from tests.local import SERVED, FakeServer, LocalServer, serving_fake
from tests.servers import PATIENCE, Reachable, ServerProcess, needs, problem, serving

# Other spellings of the same resource, by RFC 3986.
METRICS = [
    "/metrics",
    "/%6detrics",
    "/%6Detrics",
    "/%6D%65%74%72%69%63%73",
    "/metric%73",
    "/metrics?",
    "/metrics?x=1",
    "/%6detrics?prompt=x",
    "http://test/metrics",
    "http://other.example/%6detrics?x",
    "HTTP://test:80/metrics",
]
# Other resources, which do not exist.
NOT_METRICS = [
    "//metrics",
    "/metrics/",
    "/./metrics",
    "/x/../metrics",
    "/%2e/metrics",
    "/x/%2e%2e/metrics",
    "/.%2Fmetrics",
    "/%2Fmetrics",
    "%2Fmetrics",
    "/metrics%2F",
    "/metrics%3F",
    "/metrics%23x",
    "/metrics%00",
    "/metrics%0a",
    "/metrics%20",
    "/metrics;x",
    "/metrics%",
    "/metrics%zz",
    "/%256detrics",
    "/METRICS",
    "https://user:password@test/metrics",
    "/%4dETRICS",
    "/sample/metrics",
    "/health/metrics",
    "http://test//metrics",
]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def ask(server: Reachable, target: str, method: str = "GET", **headers: str) -> Answer:
    """Request a target, spelt exactly like this."""
    sent = {"Host": "test", "Connection": "close", "Content-Length": "0", **headers}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items()), "", ""]
    with socket.create_connection(server.address, PATIENCE) as connection:
        connection.sendall("\r\n".join(lines).encode())
        whole = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = whole.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    return Answer(int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body)


@pytest.fixture(scope="module")
def plain() -> Iterator[FakeServer]:
    """A server without keys."""
    with serving_fake() as server:
        yield server


@pytest.fixture(scope="module")
def locked() -> Iterator[FakeServer]:
    """A server with a key, for a proxy that serves it under /under."""
    with serving_fake(api_keys="alpha", root_path="/under/") as server:
        yield server


# The form of paths.


@pytest.mark.parametrize("target", METRICS)
def test_unreserved_characters_are_the_same_encoded_or_not(plain: FakeServer, target: str) -> None:
    answer = ask(plain, target)
    assert answer.status == 200
    assert b"stepwise_requests_total" in answer.body


@pytest.mark.parametrize("target", NOT_METRICS)
def test_no_other_spelling_is_the_same(plain: FakeServer, target: str) -> None:
    answer = ask(plain, target)
    assert answer.status in (400, 404)
    assert answer.headers["content-type"] == "application/problem+json"
    assert b"stepwise_requests_total" not in answer.body


UNRESERVED = string.ascii_letters + string.digits + "-._~"


@given(st.text(UNRESERVED + "/", max_size=20), st.data())
def test_a_path_has_one_form(path: str, data: st.DataObject) -> None:
    def spelt(c: str) -> str:
        code = f"%{ord(c):02x}"
        return data.draw(st.sampled_from([c, code, code.upper()])) if c != "/" else c

    assert one_form("/" + "".join(map(spelt, path))) == f"/{path}"


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="?#"), max_size=30))
def test_a_form_is_its_own_form_and_what_it_leaves_is_reserved(target: str) -> None:
    form = one_form(target)
    if "%25" not in target:
        assert one_form(form) == form
        assert unquote(form) == unquote(target)


# Open paths.


OPEN_SPELLINGS = ["/health", "/health/live", "/%68ealth", "http://test/health", "/", "/playground/main.js"]
CLOSED_SPELLINGS = [
    "/underhealth",
    "/under/health",
    "/under//health",
    "/under/under/health",
    "//health",
    "/health/",
    "/health/../info",
    "/health/..%2finfo",
    "/health%2f..%2finfo",
    "/health%2flive",
    "/health;/../info",
    "/playground/../info",
    "/playground/%2e%2e/info",
    "/playground/",
    "/playground",
    "/info",
    "/%69nfo",
    "/info?/health",
    "/info%3f/health",
    "/under/info",
    "http://test/info",
    "http://test/health/../info",
    "/docs",
    "/docs/",
    "/docs/swagger-ui.css",
    "/openapi.json",
    "/metrics",
    "/sample?seed=1",
    "/sample/",
    "/health/sample",
    "/healthy",
    "/HEALTH",
]


@pytest.mark.parametrize("target", OPEN_SPELLINGS)
def test_what_is_open_needs_no_key(locked: FakeServer, target: str) -> None:
    assert ask(locked, target).status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "TRACE", "PROPFIND"])
@pytest.mark.parametrize("target", CLOSED_SPELLINGS)
def test_nothing_closed_has_a_spelling_that_is_open(locked: FakeServer, target: str, method: str) -> None:
    answer = ask(locked, target, method)
    assert answer.status == 401
    assert "www-authenticate" in answer.headers


PIECES = [
    "/",
    "under",
    "health",
    "live",
    "info",
    "metrics",
    "playground",
    ".",
    "..",
    "%2f",
    "%2e",
    "%69nfo",
    "%68",
    "%00",
]


@given(st.lists(st.sampled_from(PIECES), max_size=8))
def test_without_a_key_only_the_open_paths_are_reached(keyed_app: ASGIApp, pieces: list[str]) -> None:
    """The router gets a path without a key only if the list of open paths has exactly this spelling."""
    target = "/" + "".join(pieces)
    is_open = one_form(target) in ("/", "/health", "/health/live", "/health/ready")
    assert (status_of(keyed_app, target) != 401) == is_open


@pytest.fixture(scope="module")
def keyed_app(locked: FakeServer) -> ASGIApp:
    return create_app(locked.engine, SERVED, Settings(api_keys=(SecretStr("alpha"),), root_path="/under"), Metrics())


def status_of(app: ASGIApp, target: str) -> int:
    """Call an app that a proxy serves under /under."""
    statuses: list[int] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def called() -> None:
        await app(scope, receive, send)

    path = f"/under{target}"
    scope: Scope = {
        "type": "http",
        "method": "GET",
        "headers": [],
        "root_path": "/under",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": b"",
        "client": ("127.0.0.1", 1),
    }
    asyncio.run(called())
    return statuses[0]


# Answers that the framework would give.


@pytest.mark.parametrize(
    "path", ["/sample/", "/denoise/", "/health/", "/docs/", "/static-offline-docs", "/static-offline-docs/", "/docs/x/"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_nothing_redirects(plain: FakeServer, path: str, method: str) -> None:
    """`/sample/` once redirected to http://HOST/sample with the client's Host. A POST then lost its TLS."""
    answer = ask(plain, path, method, Host="evil.example")
    assert answer.status == 404
    assert "location" not in answer.headers


ROUTES = {
    "/": {"GET", "HEAD"},
    "/denoise": {"POST"},
    "/docs": {"GET", "HEAD"},
    "/docs/swagger-ui-bundle.js": {"GET", "HEAD"},
    "/docs/swagger-ui.css": {"GET", "HEAD"},
    "/health": {"GET", "HEAD"},
    "/health/live": {"GET", "HEAD"},
    "/health/ready": {"GET", "HEAD"},
    "/info": {"GET", "HEAD"},
    "/metrics": {"GET", "HEAD"},
    "/noise": {"POST"},
    "/openapi.json": {"GET", "HEAD"},
    "/sample": {"GET", "HEAD", "POST"},
    **{f"/sdapi/v1/{name}": {"GET", "HEAD"} for name in ("embeddings", "latent-upscale-modes", "loras", "progress")},
    **{
        f"/sdapi/v1/{name}": {"GET", "HEAD"} for name in ("samplers", "schedulers", "sd-models", "sd-modules", "sd-vae")
    },
    "/sdapi/v1/upscalers": {"GET", "HEAD"},
    "/sdapi/v1/options": {"GET", "HEAD", "POST"},
    **{f"/sdapi/v1/{name}": {"POST"} for name in ("img2img", "interrupt", "txt2img")},
    "/v1/images/edits": {"POST"},
    "/v1/images/generations": {"POST"},
    "/v1/models": {"GET", "HEAD"},
    "/v1/models/{model}": {"GET", "HEAD"},
}


NOT_FOR_ALL = ("/v1/models/{model}",)


def type_of_errors(path: str) -> str:
    return "application/json" if path.startswith("/v1/") else "application/problem+json"


METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"]


def test_there_are_no_routes_but_the_documented_ones(plain: FakeServer) -> None:
    app = create_app(plain.engine, SERVED, Settings(), Metrics())
    known = {path: methods for path, methods in app.state.methods.items() if not path.startswith("/playground/")}
    assert known == ROUTES
    assert not [route for route in app.router.routes if type(route).__name__ in ("Mount", "WebSocketRoute", "Host")]


@pytest.mark.parametrize("path", [*ROUTES, "/playground/main.js"])
def test_other_methods_are_told_which_there_are(plain: FakeServer, path: str) -> None:
    allowed = ROUTES.get(path, {"GET", "HEAD"})
    for method in METHODS:
        answer = ask(plain, path, method)
        if method in allowed:
            assert answer.status in (200, 415, 422) or path in NOT_FOR_ALL
        else:
            assert answer.status == 405
            assert set(answer.headers["allow"].split(", ")) == {name.lower() for name in allowed}
            assert answer.headers["content-type"] == type_of_errors(path)


@pytest.mark.parametrize("target", ["/", "/docs", "/nowhere", "/sample/", "/sample?seed=x", "/openapi.json", "/docs/"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_no_answer_repeats_the_host(plain: FakeServer, target: str, method: str) -> None:
    for host in ("evil.example", "evil.example/nowhere", "evil.example:80", "[::1]"):
        answer = ask(plain, target, method, Host=host)
        assert b"evil" not in answer.body
        assert "evil" not in json.dumps(answer.headers)


def test_a_preflight_that_is_refused_is_a_problem_document() -> None:
    with serving_fake(cors_origins="https://a.example") as server:
        refused = server.client.options(
            "/sample", headers={"Origin": "https://b.example", "Access-Control-Request-Method": "POST"}
        )
        problem(refused, 400)
        assert "access-control-allow-origin" not in refused.headers


def test_a_websocket_is_a_get_like_others(locked: FakeServer) -> None:
    """If a WebSocket library is installed, uvicorn would bypass our HTTP checks and keys."""
    upgrade = {
        "Connection": "Upgrade, close",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
        "Sec-WebSocket-Version": "13",
    }
    assert ask(locked, "/info", **upgrade).status == 401


@pytest.mark.parametrize("path", ["/docs/none", "/docs/docs", "/playground/docs", "/docs/../docs", "//docs", "//"])
def test_a_policy_goes_by_the_whole_path(plain: FakeServer, path: str) -> None:
    """A mount once changed the path in between, so paths below it had the wrong policy and label."""
    assert ask(plain, path).headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"


@pytest.mark.parametrize("path", ["/docs", "/"])
def test_a_page_has_its_policy_however_it_is_spelt(plain: FakeServer, path: str) -> None:
    policy = ask(plain, path).headers["content-security-policy"]
    assert "script-src" in policy
    for spelling in (path.replace("d", "%64").replace("s", "%73"), f"{path}?x=1", f"http://test{path}"):
        assert ask(plain, spelling).headers["content-security-policy"] == policy


# A separate port for metrics.


@pytest.fixture(scope="module")
def apart() -> Iterator[FakeServer]:
    with serving_fake(api_keys="alpha", metrics_port=0) as server:
        yield server


class OfMetrics(Reachable):
    """The listener of METRICS_PORT."""

    def __init__(self, server: LocalServer) -> None:
        super().__init__()
        assert server.metrics_url
        self._url = server.metrics_url

    @property
    def url(self) -> str:
        return self._url


def test_metrics_move_to_a_port_of_their_own(apart: FakeServer) -> None:
    with apart.new_client(key="alpha") as client:
        problem(client.get("/metrics"), 404)
        assert "/metrics" not in client.get("/openapi.json").json()["paths"]
        assert client.get("/info").status_code == 200
    metrics = OfMetrics(apart)
    assert metrics.metric("stepwise_requests_total", endpoint="/info", code="200") >= 1  # without a key
    for target in METRICS:
        assert ask(metrics, target).status == 200
        assert ask(apart, target, Authorization="Bearer alpha").status == 404
    metrics.hang_up()


def test_nothing_else_is_at_that_port(apart: FakeServer) -> None:
    metrics = OfMetrics(apart)
    for path in [*ROUTES, *NOT_METRICS, "/redoc", "/docs/oauth2-redirect"]:
        if path != "/metrics":
            answer = ask(metrics, path)
            assert answer.status in (400, 404)
            assert answer.headers["content-type"] == type_of_errors(path)
    refused = ask(metrics, "/metrics", "POST")
    assert (refused.status, refused.headers["allow"]) == (405, "get, head")
    assert ask(metrics, "/metrics", "HEAD").body == b""


def test_with_the_server_its_port_of_metrics_closes() -> None:
    with serving_fake(metrics_port=0) as server:
        address = OfMetrics(server).address
        socket.create_connection(address, PATIENCE).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, PATIENCE)


@pytest.mark.slow
def test_the_program_says_where_its_metrics_are(weights: Path) -> None:
    with serving(WEIGHTS=weights / "grey", METRICS_PORT=0) as server:
        assert server.url
        line = server.wait_for_line(lambda line: line["message"].startswith("metrics at http://127.0.0.1:"))
        with server.new_client() as client:
            url = line["message"].removeprefix("metrics at ")
            assert "stepwise_images_total" in client.get(url).text
            problem(client.get("/metrics"), 404)


# Logs.

SECRET = "open-sesame"
TELLING = [
    f"/sample?prompt={SECRET}",
    f"/sample%3Fprompt={SECRET}",
    f"/sample%3fprompt%3d{SECRET}",
    f"/sample;prompt={SECRET}",
    f"/sample&prompt={SECRET}",
    f"/sample%20{SECRET}",
    f"/sample%0A{SECRET}",
    f"/nowhere?{SECRET}",
    f"//user:{SECRET}@test/sample",
    f"http://user:{SECRET}@test/sample",
    f"http://user:{SECRET}@test/nowhere?{SECRET}",
    f"/nowhere/{'x' * 100}{SECRET}",
    f"/%zz?{SECRET}",
]
CREDENTIALS = [
    {"Authorization": f"Bearer {SECRET}"},
    {"Authorization": f"Basic {SECRET}"},
    {"X-API-Key": SECRET},
    {"Cookie": SECRET},
    {"Referer": f"http://test/?{SECRET}"},
    {"User-Agent": SECRET},
    {"X-Request-ID": f"a {SECRET}"},
]


def tell_secrets(server: Reachable) -> None:
    for target in TELLING:
        ask(server, target)
    for headers in CREDENTIALS:
        ask(server, "/sample?seed=x", **headers)
        ask(server, "/nowhere", "POST", **headers)


def test_logs_have_no_query_and_no_key(server: ServerProcess) -> None:
    tell_secrets(server)
    ask(server, "/info", **{"X-Request-ID": "after-secrets"})
    server.wait_for_line(lambda line: line.get("request_id") == "after-secrets")
    assert SECRET not in json.dumps(server.lines)


def test_what_is_logged_of_a_path_is_plain() -> None:
    assert loggable("/under/sample") == "/under/sample"
    assert loggable("/health/live") == "/health/live"
    assert loggable('/nowhere"\n') == "/nowhere…"
    assert loggable("/wp-login.php") == "/wp-login.php"
    assert loggable("/" + "x" * 100) == "/" + "x" * 99 + "…"


def test_a_trace_says_where_and_not_what() -> None:
    def look_up() -> None:
        ROUTES[SECRET]

    def fail() -> None:
        try:
            look_up()
        except KeyError as error:
            raise ValueError(f"{SECRET} is wrong") from error

    with pytest.raises(ValueError, match=SECRET) as raised:
        fail()
    trace = trace_without_messages(raised.value)
    assert SECRET not in trace
    assert trace.startswith("ValueError\n")
    assert "after KeyError\n" in trace
    assert "in fail" in trace


# The balancer.


@contextmanager
def balanced_here(server: FakeServer, log: Path) -> Iterator[Reachable]:
    host, port = server.address
    with log.open("wb") as file, balancing([host], port, file) as balancer:
        balancer.wait_until(up=1)
        yield balancer


@pytest.mark.slow
@needs("haproxy")
def test_the_balancer_hides_metrics_however_they_are_spelt(plain: FakeServer, tmp_path: Path) -> None:
    """HAProxy once compared the raw path, so /%6detrics showed the metrics of one replica."""
    with balanced_here(plain, tmp_path / "log") as balancer:
        for target in [*METRICS, *NOT_METRICS, "/metrics#x", "/%6detrics#", "metrics"]:
            for method in ("GET", "HEAD", "POST", "OPTIONS"):
                answer = ask(balancer, target, method)
                assert answer.status in (400, 404), target
                assert b"stepwise_" not in answer.body
                assert "version=" not in answer.headers.get("content-type", "")
        assert ask(balancer, "/info").status == 200


@pytest.mark.slow
@needs("haproxy")
def test_the_balancers_log_has_no_query_and_no_key(plain: FakeServer, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with balanced_here(plain, log) as balancer:
        tell_secrets(balancer)
        answer = ask(balancer, "/info?x=1")
        sent = ask(balancer, "/info", **{"X-Request-ID": "mine"})
        for _ in range(10_000):
            if b" mine\n" in log.read_bytes():
                break
            ask(balancer, "/health/live")
    lines = log.read_text().splitlines()
    assert SECRET not in "\n".join(lines)
    [line] = [line for line in lines if answer.headers["x-request-id"] in line]
    assert " replicas/replica1 " in line
    assert " 200 " in line
    assert " GET /info HTTP/1.1 " in line
    assert sent.headers["x-request-id"] == "mine"
