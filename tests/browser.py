"""Headless Chromium by Playwright, and checks that every page must pass."""

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import yaml
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from tests.servers import PATIENCE

# Chromium's own console message for every error answer, even if the page handles it.
REFUSED = "Failed to load resource: the server responded with a status of"
GONE = "Failed to load resource: net::ERR_"


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visiting(browser: Browser, url: str, expected: tuple[str, ...] = (), **options: Any) -> Iterator[Page]:
    """A page in its own browser context. At the end the page must be free of faults.

    No script has raised an error. The console has only messages with an `expected` prefix, so the page's policy blocked
    nothing. The page has made requests only to its own host.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(1000 * PATIENCE)
    said: list[str] = []
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    try:
        page.goto(url)
        yield page
    finally:
        context.close()
    assert [text for text in said if not text.startswith(expected)] == []
    host = urlsplit(url).netloc
    assert {urlsplit(one).netloc for one in asked if one.startswith(("http:", "https:", "ws"))} <= {host}


# axe's rules for WCAG 2.2, and an experimental one: a control's name contains its visible text, for speech input.
_RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
_RULES_TOO = {"rules": {"label-content-name-mismatch": {"enabled": True}}}
_CONTROLS = {"link", "button", "textbox", "radio", "checkbox", "slider", "spinbutton", "combobox", "progressbar"}
_GROUPS = {"group", "region", "dialog", "form", "table", "navigation", "list"}
_SHOWN = re.compile(r'(?P<role>[a-z]+)(?: "(?P<name>(?:[^"\\\\]|\\\\.)*)")?')


def assert_accessible(page: Page) -> None:
    """Check that the page breaks no rule of axe, and that each control's name is unique in its group and role."""
    found = Axe().run(page, options={**_RULES, **_RULES_TOO}).response["violations"]
    broken = [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found]
    assert broken == [], broken
    named = Counter(_controls(yaml.safe_load(page.locator("body").aria_snapshot()), ""))
    assert named
    wrong = [control for control, count in named.items() if not control[2] or count > 1]
    assert wrong == [], wrong


def _controls(shown: Any, group: str) -> Iterator[tuple[str, str, str]]:
    """Group, role and name of each control in Playwright's snapshot, which is YAML."""
    for one in shown if isinstance(shown, list) else []:
        text, below = next(iter(one.items())) if isinstance(one, dict) else (one, None)
        match = _SHOWN.match(str(text))
        role, name = (match["role"], match["name"] or "") if match else ("", "")
        if role in _CONTROLS:
            yield group, role, name
        yield from _controls(below, f"{role} {name}" if role in _GROUPS and name else group)
