"""docs/contributing.md lists what only `make test-all` runs."""

import ast
import re
from pathlib import Path

from tests.servers import ROOT


def has_slow_tests(module: Path) -> bool:
    return any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.slow"
        for node in ast.walk(ast.parse(module.read_text()))
    )


def test_the_modules_with_slow_tests_are_listed() -> None:
    text = (ROOT / "docs" / "contributing.md").read_text()
    section = text.partition("### What only `make test-all` runs")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`(test_\w+)`", section))
    slow = [module.stem for module in (ROOT / "tests").glob("test_*.py") if has_slow_tests(module)]
    assert sorted(listed) == sorted(slow)
