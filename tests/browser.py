"""Chromium without a window, by Playwright, and what must hold of every page that it shows."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, sync_playwright

from tests.servers import PATIENCE

# What Chromium itself says on the console of an answer that is an error, however well the page takes it.
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
    """A page in a browser of its own, so to say. At its end nothing may have gone wrong in it.

    No script raised an error, nothing was written to the console but what is expected, which begins so; nothing was
    blocked by the page's policy, and no other host was asked.
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
