"""The files of the playground and of /docs: their contents, and how long a browser caches them."""

import hashlib
import re
from pathlib import Path

import pytest

from service.http import page
from tests.browser import chromium, visiting
from tests.servers import ServerProcess, needs, problem

FOLDER = Path(page.__file__).with_name("playground")
PATHS = ["/", *(f"/playground/{path.name}" for path in sorted(FOLDER.iterdir()) if path.name != "index.html")]
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def test_files_are_served_as_what_they_are(server: ServerProcess) -> None:
    for path in PATHS:
        answer = server.client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].split(";")[0] == KINDS[Path(path).suffix or ".html"]
        head = server.client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(answer.content))


def test_a_browser_asks_whether_it_has_the_newest_version(server: ServerProcess) -> None:
    for path in PATHS:
        answer = server.client.get(path)
        assert answer.headers["cache-control"] == "no-cache"
        again = server.client.get(path, headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert server.client.get(path, headers={"If-None-Match": '"other"'}).content == answer.content
    assert len({server.client.get(path).headers["etag"] for path in PATHS}) == len(PATHS)


def test_nothing_else_is_there(server: ServerProcess) -> None:
    for path in ("/playground", "/playground/", "/playground/none.js", "/playground/index.html"):
        problem(server.client.get(path), 404)
    for path in ("/playground/..%2Fpage.py", "/playground/%2e%2e/page.py", "/playground//etc/passwd"):
        problem(server.client.get(path), 404)
    refused = server.client.post("/playground/main.js")
    problem(refused, 405)
    assert refused.headers["allow"] == "GET, HEAD"


def test_files_share_a_label(server: ServerProcess) -> None:
    for path in PATHS:
        server.client.get(path)
    labels = {dict(pairs)["endpoint"] for name, pairs in server.metrics() if name == "stepwise_requests_total"}
    assert "/" in labels
    assert not [label for label in labels if "playground" in label]


def test_the_page_and_its_files_are_open(strict_server: ServerProcess) -> None:
    with strict_server.new_client() as client:
        del client.headers["authorization"]
        for path in PATHS:
            assert client.get(path).status_code == 200
        problem(client.get("/playground/none.js"), 401)


# Swagger UI

SWAGGER = FOLDER.with_name("swagger")
ASSETS = ["swagger-ui-bundle.js", "swagger-ui.css"]


def test_swagger_ui_is_the_published_one(server: ServerProcess) -> None:
    served = [(hashlib.sha256(server.client.get(f"/docs/{name}").content).hexdigest(), name) for name in ASSETS]
    assert "".join(f"{digest}  {name}\n" for digest, name in served) == (SWAGGER / "SHA256SUMS").read_text()
    [version] = re.findall(r"^# Swagger UI (\S+)$", (SWAGGER / "README.md").read_text(), re.MULTILINE)
    assert f'PACKAGE_VERSION:"{version}"' in server.client.get(f"/docs/{ASSETS[0]}").text


@pytest.mark.parametrize(
    ("accepted", "is_zipped"),
    [
        ("gzip", True),
        ("br, GZIP;q=0.5", True),
        ("deflate, gzip ;q=1.0, *;q=0", True),
        ("", False),
        ("identity", False),
        ("gzip;q=0, br", False),
        ("gzip;q=0.000", False),
        ("x-gzipped", False),
    ],
)
def test_swagger_ui_is_compressed_for_who_accepts_it(server: ServerProcess, accepted: str, is_zipped: bool) -> None:
    for name in ASSETS:
        plain = server.client.get(f"/docs/{name}", headers={"Accept-Encoding": "identity"})
        answer = server.client.get(f"/docs/{name}", headers={"Accept-Encoding": accepted})
        assert answer.content == plain.content  # httpx decompresses
        assert answer.headers["vary"] == "Accept-Encoding"
        assert (answer.headers.get("content-encoding") == "gzip") == is_zipped
        assert (int(answer.headers["content-length"]) < len(answer.content) / 3) == is_zipped
        assert (answer.headers["etag"] != plain.headers["etag"]) == is_zipped
        for tag in (answer.headers["etag"], plain.headers["etag"]):
            again = server.client.get(f"/docs/{name}", headers={"Accept-Encoding": accepted, "If-None-Match": tag})
            assert again.status_code == (304 if tag == answer.headers["etag"] else 200)


@pytest.mark.slow
@needs("chromium")
def test_chromium_shows_the_documentation_and_asks_no_other_host(server: ServerProcess) -> None:
    with chromium() as browser, visiting(browser, f"{server.url}/docs") as page:
        page.locator("#operations-images-sample").click()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        image = page.locator(".live-responses-table img")
        image.wait_for()
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 16
