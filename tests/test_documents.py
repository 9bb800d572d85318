"""What documents say of the tests is true: which are slow, and which show what happens at a fault."""

import ast
import re
from pathlib import Path

from tests.servers import ROOT

TESTS = ROOT / "tests"


def has_slow_tests(module: Path) -> bool:
    return any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.slow"
        for node in ast.walk(ast.parse(module.read_text()))
    )


def test_the_modules_with_slow_tests_are_listed() -> None:
    text = (ROOT / "docs" / "contributing.md").read_text()
    section = text.partition("### What only `make test-all` runs")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`(test_\w+)`", section))
    slow = [module.stem for module in TESTS.glob("test_*.py") if has_slow_tests(module)]
    assert sorted(listed) == sorted(slow)


def test_every_fault_has_the_tests_that_are_named() -> None:
    """`test_server: a_name, the_beginning_of_…; test_fuzz`"""
    rows = re.findall(r"^\| .* \| .* \| (test_.*) \|$", (ROOT / "docs" / "reliability.md").read_text(), re.MULTILINE)
    assert len(rows) > 30
    for module, _, names in (part.partition(": ") for row in rows for part in re.split(r"[;,] (?=test_)", row)):
        tests = re.findall(r"^def (test_\w+)", (TESTS / f"{module}.py").read_text(), re.MULTILINE)
        for name in names.split(", ") if names else ():
            pattern = re.escape(f"test_{name}").replace("…", r"\w*")
            assert any(re.fullmatch(pattern, test) for test in tests), f"{module}: {name}"


def test_files_that_documents_point_at_exist() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        named = re.findall(
            r"`((?:service|model|stepwise|tests|bench|weights|deploy)/[\w/.-]+\.\w+)`", document.read_text()
        )
        assert [name for name in named if not (ROOT / name).exists()] == [], document.name
