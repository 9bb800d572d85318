"""The playground's files: what they are, how long they are kept, and that they are open."""

from pathlib import Path

from service.http import page
from tests.servers import ServerProcess, problem

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
