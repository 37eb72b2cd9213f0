"""The browser that the tests of pages share: fixtures, which conftest.py imports."""

import shutil

import pytest

# no sandbox, because containers often forbid it; nothing that calls home
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="session")
def chromium():
    """Headless Chromium, driven by Playwright, and what it is started with: (browser type, options of `launch`)."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if not executable:
        pytest.skip("needs a chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium, {"executable_path": executable, "args": ARGUMENTS}


@pytest.fixture(scope="session")
def browser(chromium):
    """The browser that tests of pages share."""
    kind, options = chromium
    started = kind.launch(**options)
    yield started
    started.close()
