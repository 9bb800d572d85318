"""Headers of every answer, and the open paths of a server with keys."""

import pytest

from tests.browser import chromium, visiting
from tests.local import serving_fake
from tests.servers import Reachable, needs, problem

LOCKED = "default-src 'none'; frame-ancestors 'none'"


def security(server: Reachable, path: str) -> dict[str, str]:
    headers = server.client.get(path).headers
    names = ("content-security-policy", "x-content-type-options", "referrer-policy", "x-frame-options")
    return {name: headers[name] for name in names}


def test_no_answer_is_a_page_that_loads_or_is_framed(server: Reachable) -> None:
    for path in ("/sample?seed=one", "/info", "/health/ready", "/metrics", "/nowhere"):
        assert security(server, path) == {
            "content-security-policy": LOCKED,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "x-frame-options": "DENY",
        }


def test_an_image_may_be_styled_by_the_browser_that_shows_it(server: Reachable) -> None:
    policy = security(server, "/sample?seed=1")["content-security-policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
    answer = server.client.get("/sample?seed=1", headers={"Accept": "application/json"})
    assert answer.headers["content-security-policy"] == LOCKED


@pytest.mark.slow
@needs("chromium")
def test_chromium_shows_an_image_in_a_tab_without_a_complaint(server: Reachable) -> None:
    with chromium() as browser, visiting(browser, f"{server.url}/sample?seed=1") as page:
        assert page.locator("img").evaluate("image => getComputedStyle(image).display") == "block"


def test_the_documentation_may_load_what_it_needs_from_here_alone(server: Reachable) -> None:
    policy = security(server, "/docs")["content-security-policy"]
    sources = dict(part.split(" ", 1) for part in policy.split("; "))
    assert sources["default-src"] == "'none'"
    assert sources["script-src"].startswith("'self'")
    assert sources["frame-ancestors"] == "'none'"
    assert "http" not in policy


def test_the_playground_may_load_and_ask_from_here_alone(server: Reachable) -> None:
    assert security(server, "/") == {
        "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "x-frame-options": "DENY",
    }
    assert security(server, "/playground/main.js")["content-security-policy"] == LOCKED


@pytest.mark.parametrize("public", [False, True])
def test_metrics_need_a_key_unless_they_are_public(public: bool) -> None:
    with serving_fake(api_keys="alpha", public_metrics=public) as server:
        answer = server.client.get("/metrics")
        if public:
            assert answer.status_code == 200
            assert "stepwise_requests_total" in answer.text
        else:
            problem(answer, 401)
        problem(server.client.post("/sample", json={}), 401)
        problem(server.client.get("/metrics/more"), 401)
        assert server.client.get("/health/ready").status_code == 200
        problem(server.client.get("/healthy"), 401)
