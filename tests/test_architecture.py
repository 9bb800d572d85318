"""The structure of the tree, where `make check` does not check it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.config import Settings
from service.http.metrics import Metrics
from service.http.operations import Operations
from tests.engines import FakeRunner, a_setting
from tests.local import SERVED

ROOT = Path(__file__).parent.parent
MODULES = sorted(path for folder in ("stepwise", "service", "model") for path in (ROOT / folder).rglob("*.py"))
MOST_LINES = 350  # per module
MOST_LINES_OF_A_CLASS = 250  # per class in service/engine


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_can_be_read_at_once(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", sorted((ROOT / "service/engine").glob("*.py")), ids=lambda path: path.name)
def test_a_class_of_the_engine_can_be_read_at_once(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MOST_LINES_OF_A_CLASS, node.name


def ours(thing: object) -> bool:
    return type(thing).__module__.startswith(("service.", "stepwise."))


def parts(thing: object) -> Iterator[object]:
    """Objects of our own classes that an object holds."""
    names = [*getattr(thing, "__dict__", ()), *getattr(type(thing), "__slots__", ())]
    for name in names:
        one = getattr(thing, name, None)
        members = one.values() if isinstance(one, dict) else one if isinstance(one, list | tuple) else [one]
        yield from (member for member in members if ours(member))


@pytest.mark.parametrize("all_stages", [False, True])
def test_no_object_of_an_idle_engine_leads_back_to_itself(all_stages: bool) -> None:
    more = {"decode_seconds": {1: 1.0}, "text_seconds": 1.0, "check_seconds": 1.0} if all_stages else {}
    setting = a_setting(FakeRunner({1: 1.0}), **more)  # type: ignore[arg-type]
    operations = Operations(setting.engine, SERVED, Settings(), Metrics())
    seen: set[str] = set()

    def visit(thing: object, above: list[object]) -> None:
        names = " → ".join(type(one).__name__ for one in [*above, thing])
        assert all(thing is not one for one in above), names
        seen.add(type(thing).__name__)
        for part in parts(thing):
            visit(part, [*above, thing])

    visit(operations, [])
    assert {"Engine", "Queue", "Health", "Denoising", "Stage", "Answer", "Metrics"} <= seen
    for stage in ("Encode", "Decode", "Check"):
        assert (stage in seen) is all_stages
