"""A headless Chromium for tests of pages: nothing of it goes online, and everything a page complains of is kept.

Chromium comes from the system (Debian: `apt-get install -y --no-install-recommends chromium`), playwright from the dev
extra; playwright's own download of a browser is not used.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium on this machine: apt-get install -y --no-install-recommends chromium (or google-chrome)",
)
TIMEOUT_MS = 90_000
"""For one wait. A busy machine is slow; a wait that is over goes on at once."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser that is closed at the end."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


class Visit:
    """One page open in a browser: what it asked for and complained of.

    Attributes:
        page: playwright's page.
        requests: every address asked for, the page's own file first.
        complaints: console messages of any kind, and errors that no script caught.
    """

    def __init__(self, context: BrowserContext, path: Path) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        context.set_default_timeout(TIMEOUT_MS)
        context.on("request", lambda request: self.requests.append(request.url))
        context.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        self.page: Page = context.new_page()
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]", state="attached")

    def foreign_requests(self) -> list[str]:
        """Every request but that of the page's own file; data: and blob: hold their content themselves."""
        return [url for url in self.requests[1:] if not url.startswith(("data:", "blob:"))]


@contextmanager
def visit(browser: Browser, path: Path, **settings: object) -> Iterator[Visit]:
    """Open a file in a context of its own, offline, with leave to use the clipboard.

    Args:
        browser: from `chromium`.
        path: the page.
        settings: of playwright's `new_context`: `color_scheme`, `viewport`, ...
    """
    context = browser.new_context(
        offline=True,
        permissions=["clipboard-read", "clipboard-write"],
        **settings,  # pyright: ignore[reportArgumentType]
    )
    yield Visit(context, path)
    context.close()
