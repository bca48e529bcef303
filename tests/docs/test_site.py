"""The built site: it loads nothing from elsewhere, searches without a server, and fits a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

#: What a browser fetches by itself: scripts, pictures, style sheets; not links.
LOADED = re.compile(r"""<(?:(?:script|img|iframe|source)[^>]+src|link[^>]+href)=["']?(https?:[^"'\s>]+)""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    output = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return output


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    assert [url for page in pages for url in LOADED.findall(page.read_text(encoding="utf-8"))] == []


@pytest.mark.slow
def test_tables_examples_and_formulas_are_in_the_pages(site: Path) -> None:
    losses = (site / "losses.html").read_text(encoding="utf-8")
    assert losses.count("https://arxiv.org/abs/2509.14526") >= 3
    assert not re.search(r"<!-- \w+ -->", losses)
    assert "chunked_loss" in (site / "python.html").read_text(encoding="utf-8")
    assert "<math" in (site / "design.html").read_text(encoding="utf-8")
    assert "Screening" in (site / "results" / "dolly_cpu.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_browser_shows_and_searches_the_pages_offline(site: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium)
        for width, scheme in ((1280, "light"), (390, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            said: list[str] = []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.route(
                re.compile(r"^https?:"), lambda route, said=said: (said.append(route.request.url), route.abort())
            )
            for name in ("index", "losses", "design", "results/scale"):
                page.goto((site / f"{name}.html").as_uri())
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (name, width)
            assert said == []
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto((site / "results" / "scale.html").as_uri())
        page.fill("input.md-search__input", "temperature")
        page.get_by_text("matching documents").wait_for()
        browser.close()
