"""What documents say about the program is true: files, links, settings, messages, and named tests."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.answers import EXCHANGE, Message, laid_out, read
from bench.settings import DOCUMENT, renewed
from service import config
from tests.servers import ROOT, ServerProcess, read_parameters

TESTS = ROOT / "tests"
PACKAGES = ("stepwise", "service", "model")
DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "work"} & set(path.relative_to(ROOT).parts))
# Variables of the client, docker-compose.yml, haproxy.cfg.template and one test.
OTHER_VARIABLES = {"URL", "API_KEY", "REPLICAS", "RETRIED_BODY", "LONGEST", "REFERENCE_WEIGHTS"}


def section(document: str, heading: str) -> str:
    """The text under a heading, up to the next heading of its level or above."""
    text = (ROOT / document).read_text().partition(f"\n{heading}\n")[2]
    return re.split(rf"^#{{1,{heading.index(' ')}}} ", text, maxsplit=1, flags=re.MULTILINE)[0]


def has_slow_tests(module: Path) -> bool:
    return any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.slow"
        for node in ast.walk(ast.parse(module.read_text()))
    )


def test_the_modules_with_slow_tests_are_listed() -> None:
    listed = set(re.findall(r"`(test_\w+)`", section("docs/contributing.md", "### What only `make test-all` runs")))
    slow = [module.stem for module in TESTS.glob("test_*.py") if has_slow_tests(module)]
    assert sorted(listed) == sorted(slow)


def test_every_fault_has_the_tests_that_are_named() -> None:
    """`test_server: a_name, the_beginning_of_…; test_fuzz`"""
    tables = "".join((ROOT / "docs" / name).read_text() for name in ("reliability.md", "text.md"))
    rows = re.findall(r"^\| .* \| .* \| (test_.*) \|$", tables, re.MULTILINE)
    assert len(rows) > 30
    for module, _, names in (part.partition(": ") for row in rows for part in re.split(r"[;,] (?=test_)", row)):
        tests = re.findall(r"^def (test_\w+)", (TESTS / f"{module}.py").read_text(), re.MULTILINE)
        for name in names.split(", ") if names else ():
            pattern = re.escape(f"test_{name}").replace("…", r"\w*")
            assert any(re.fullmatch(pattern, test) for test in tests), f"{module}: {name}"


# Files and links


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_documents_name_exist(document: Path) -> None:
    named = re.findall(r"`((?:service|model|stepwise|tests|bench|weights|deploy)/[\w/.-]+\.\w+)`", document.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in links(document.read_text()):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            page = target / "README.md" if target.is_dir() else target
            assert anchor in anchors(page.read_text()), link


def links(text: str) -> Iterator[str]:
    """Targets of links and images inside the repository."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
        target = "".join(link)
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def test_links_and_anchors_are_found() -> None:
    text = '# The `GET` of /a, *so*\n[a](b.md#c) ![d](e.png)\n```\n[no](no.md)\n```\n<img src="f.png"> [w](https://x)'
    assert list(links(text)) == ["b.md#c", "e.png", "f.png"]
    assert anchors(text) == {"the-get-of-a-so"}


# README


def test_the_readme_is_a_page_and_links_to_every_document() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 100
    assert {path for path in links(text) if path.endswith(".md")} >= {
        f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_is_told_to_install_what_is_not_ours(document: Path) -> None:
    """The name `stepwise` on PyPI belongs to another project."""
    commands = re.findall(r"pip install [^`\n]*", document.read_text().replace("`pip install stepwise` installs", ""))
    assert [command for command in commands if re.search(r"(?<![\w/.-])stepwise\b(?!/)", command)] == []


# docs/architecture.md


def test_the_tree_has_every_module_once_and_nothing_else() -> None:
    tree = section("docs/architecture.md", "## The tree").partition("```\n")[2].partition("```")[0]
    folder, listed = "", []
    for line in filter(None, tree.splitlines()):
        name, _, described = line.strip().partition("  ")
        assert described.strip(), f"{name} is not described"
        if line.startswith(" "):
            listed.append(f"{folder}{name}")
        else:
            folder = name
            assert (ROOT / folder).is_dir(), folder
    modules = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    there = [str(path.relative_to(ROOT)) for path in modules if path.name != "__init__.py"]
    assert sorted(listed) == sorted(there)


# docs/settings.md


def test_the_table_of_settings_is_the_one_that_make_docs_makes() -> None:
    text = DOCUMENT.read_text()
    assert renewed(text) == text
    for name in config.Settings.model_fields:
        assert f"\n| `{config.PREFIX}{name.upper()}` | " in text


def test_a_document_without_marks_is_not_renewed() -> None:
    with pytest.raises(ValueError, match="lacks a mark"):
        renewed("# Settings\n")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_that_documents_name_exist(document: Path) -> None:
    known = {*map(str.upper, config.Settings.model_fields), *config.PLANNED, *OTHER_VARIABLES}
    named = set(re.findall(rf"{config.PREFIX}([A-Z_]*[A-Z])", document.read_text()))
    assert sorted(named - known) == []


# docs/troubleshooting.md


def test_messages_are_those_of_the_program() -> None:
    """`> all … places of the queue are taken`: one string of the code has the parts around … in this order."""
    messages = re.findall(r"^> (.*)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 10
    said = "\n".join([*strings(), (ROOT / "Makefile").read_text()])
    for message in messages:
        pattern = ".*".join(map(re.escape, message.split("…")))
        assert re.search(pattern, said), message


def strings() -> Iterator[str]:
    """The text of each string in the code on its own line, with … for each value of an f-string."""
    for package in PACKAGES:
        for module in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(module.read_text())):
                match node:
                    case ast.JoinedStr(values=values):
                        parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in values)
                        yield "".join(parts).replace("\n", " ")
                    case ast.Constant(value=str(text)):
                        yield text.replace("\n", " ")


# docs/api.md


def exchanges() -> list[tuple[Message, Message]]:
    """Each request in docs/api.md with its answer."""
    found = EXCHANGE.finditer((ROOT / "docs" / "api.md").read_text())
    return [(read(exchange["request"]), read(exchange["answer"])) for exchange in found]


@pytest.mark.parametrize(("asked", "shown"), exchanges(), ids=lambda message: message.start.partition("?")[0])
def test_whole_answers_are_what_a_server_answers(server: ServerProcess, asked: Message, shown: Message) -> None:
    """The same status, headers and shape. Problem documents are equal word for word, except for Python's title."""
    method, path = asked.start.split()
    answer = server.client.request(method, path, headers=asked.headers, content=asked.body.encode())
    assert shown.start.split()[:2] == ["HTTP/1.1", str(answer.status_code)]
    assert sorted(answer.headers) == sorted(shown.headers)
    assert answer.headers["content-type"] == shown.headers["content-type"]
    match answer.headers["content-type"].partition(";")[0]:
        case "application/problem+json":
            assert answer.json() | {"title": ""} == json.loads(shown.body) | {"title": ""}
        case "application/json":
            assert shape(answer.json()) == shape(json.loads(shown.body))
        case "text/event-stream":
            assert shapes_of_events(shown.body) == shapes_of_events(answer.text)
        case media_type:
            assert media_type == "image/png"


def shapes_of_events(text: str) -> dict[str, Any]:
    return {
        name: shape(json.loads(data)) for name, data in re.findall(r"^event: (.*)\ndata: (.*)$", text, re.MULTILINE)
    }


def shape(value: Any) -> Any:
    """Keys and types, without what depends on the machine: widths of passes, and the fingerprint's parts."""
    match value:
        case dict():
            named = {"a width" if name.isdigit() else name: one for name, one in value.items()}
            return {name: "parts" if name == "fingerprint_parts" else shape(one) for name, one in named.items()}
        case list():
            return [shape(value[0])] if value else []
        case bool():
            return "bool"
        case int() | float():
            return "number"
    return type(value).__name__


def test_the_recipe_is_the_one_in_a_png(server: ServerProcess) -> None:
    png = server.client.get("/sample", params={"class_label": "7", "seed": "1"}).content
    [shown] = re.findall(r"```json\n(.*?)```", section("docs/api.md", "### A PNG"), re.DOTALL)
    assert shape(read_parameters(png)) == shape(json.loads(shown))


def test_every_field_of_info_is_described(server: ServerProcess) -> None:
    cells = re.findall(r"^\| (`.*?) \|", section("docs/api.md", "### /info"), re.MULTILINE)
    assert sorted(name for cell in cells for name in re.findall(r"`(\w+)`", cell)) == sorted(
        server.client.get("/info").json()
    )


def test_every_metric_is_described(server: ServerProcess) -> None:
    cells = re.findall(r"^\| (`.*?) \|", section("docs/api.md", "## Metrics"), re.MULTILINE)
    described = {name.removesuffix("_total") for cell in cells for name in re.findall(r"`([a-z_]+)", cell)}
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    there = {family.name.removeprefix("stepwise_") for family in families if family.name.startswith("stepwise_")}
    there = {name for name in there if not name.endswith("_created")}
    assert there <= described
    assert described - there == {"decode_cost_seconds", "text_cost_seconds"}  # of latent models, and those with text


def test_json_is_laid_out_on_lines_that_fit() -> None:
    short, long = {"a": [1, {"b": None}]}, {f"name {i}": ["text"] * i for i in range(30)}
    assert laid_out(short) == json.dumps(short)
    assert json.loads(laid_out(long)) == long
    assert max(map(len, laid_out(long).splitlines())) <= 118
