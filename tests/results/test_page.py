"""The page: complete, self-contained, and safe whatever models wrote."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from deltakd.config.compose import CONF_DIR
from deltakd.config.loss_names import read_losses
from deltakd.evaluation.token_groups import Estimate, Group, Preservation, ViewedRow, ViewedToken
from deltakd.results.methods import make_methods
from deltakd.results.page import Page, make_page, render, write_report
from deltakd.results.reading import find_runs
from deltakd.results.tables import make_comparisons
from tests.results.fake import write_run

EVIL = "</script><script>window.evil = 1</script><img src=x onerror=\"window.evil = 1\"><!-- {{ 1 }} 'quoted' & more"


def preservation(text: str = " word", missing: tuple[str, ...] = ()) -> Preservation:
    if missing:
        return Preservation(missing=list(missing))
    measures = dict.fromkeys(("correlation", "kl_teacher", "kl_raw", "top1_agreement", "nll"), Estimate(0.5, 0.125))
    group = Group(tokens=1000, rows=8, undefined=0, measures=measures)
    roles = ("student", "student_raw", "teacher", "teacher_raw")
    candidates = {role: [(text, 0.75), ("\n", 0.125)] for role in roles}
    tokens = [ViewedToken(text, 1.5, -0.5, 0.25, candidates), ViewedToken("\n", None, 0.0, None, candidates)] * 6
    views = [ViewedRow(3, f"Say\n\n{text}", tokens), ViewedRow(5, "Second\nprompt", tokens)]
    by_class = {"word start": group, "end of text": group}
    return Preservation([], {}, group, {"0": group, "1": group}, by_class, views, {f"a task,{text}": group})


def page_on(folder: Path, text: str = " word") -> Page:
    """A report on runs that wrote ``text``."""
    for number, loss in enumerate(("sft", "kd", "delta_kd")):
        record = {"output": text, "prompt": f"Question {text}", "reference": [text]}
        write_run(folder / "runs" / str(number), loss, level=20.0 + number, record=record)
    write_run(folder / "runs" / "half", "kd", 9, finished=False)
    methods = make_methods(find_runs([str(folder / "runs")]).runs, read_losses(CONF_DIR / "loss"), [])
    measured = {"sft": [preservation(missing=("teacher_raw: it is gone",))], "kd": [preservation(text)]}
    tables = make_comparisons(methods, None, mixed=False)
    return make_page(f"A title {text}", methods, tables, measured, [f"left out {text}"], f"command {text}")


class Elements(HTMLParser):
    """Tags with their attributes, and the text inside of each kind."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(page: str) -> Elements:
    elements = Elements()
    elements.feed(page)
    return elements


def test_the_page_shows_everything_and_needs_nothing_else(tmp_path: Path) -> None:
    file = write_report(page_on(tmp_path), tmp_path / "report")[0]
    text = file.read_text(encoding="utf-8")
    page = parsed(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "a task, word" in page.text
    sections = {attributes["id"] for tag, attributes in page.tags if tag == "section"}
    shown = "results beyond weights curves parts preservation tokens answers cost runs"
    assert sections == set(shown.split())
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert links == {f"#{name}" for name in sections}
    assert not [tag for tag, attributes in page.tags if tag in ("link", "img", "iframe") or "src" in attributes]
    assert not re.findall(r"@import|url\((?!#)", text)
    for said in ("step 12 of 40", "sft: teacher_raw: it is gone", "0123456789-dirty", "torch 2.9", "run_dir=", "0.500"):
        assert said in page.text
    assert {path.name for path in file.parent.iterdir()} == {"report.html", "report.md", "table.tex", "figures"}
    assert "step 12 of 40" in (file.parent / "report.md").read_text(encoding="utf-8")
    assert len(list((file.parent / "figures").glob("*.pdf"))) == 4 + 1 + 6 + 1


def test_what_models_write_stays_text(tmp_path: Path) -> None:
    text = render(page_on(tmp_path, EVIL))
    page = parsed(text)
    assert [tag for tag, _ in page.tags if tag == "script"] == ["script", "script"]
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert EVIL in page.text
    data = re.search(r'<script type="application/json" id="token-data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    view = json.loads(data.group(1))["views"][0]["rows"][0]
    assert view["tokens"][0]["text"] == EVIL
    assert view["tokens"][1]["teacher"] is None
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'", text)


def test_paths_are_tidied_wherever_they_are_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "sft")
    write_run(tmp_path / "half", "kd", finished=False)
    methods = make_methods(find_runs([str(tmp_path)]).runs, read_losses(CONF_DIR / "loss"), [])
    page = make_page(
        "t", methods, make_comparisons(methods, None, mixed=False), {}, [f"{tmp_path}/x"], f"do {tmp_path}"
    )
    text = render(page, lambda said: said.replace(str(tmp_path), "HERE"))
    assert str(tmp_path) not in text
    assert text.count("HERE/half") >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_a_browser_opens_the_page_and_shows_the_candidates(tmp_path: Path, width: int, scheme: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    file = tmp_path / "report.html"
    file.write_text(render(page_on(tmp_path, EVIL)), encoding="utf-8")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        assert page.evaluate("window.evil") is None
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        ground = "getComputedStyle(document.body).backgroundColor"
        before = page.evaluate(ground)
        assert (before == "rgb(255, 255, 255)") == (scheme == "light")
        page.click("#theme")
        assert page.evaluate(ground) != before
        card = page.locator("#view-card")
        assert card.is_hidden()
        tokens = page.locator(".token")
        tokens.nth(1).hover()
        assert "teacher's shift not finite" in card.inner_text()
        page.mouse.move(1, 1)
        assert card.is_hidden()
        tokens.nth(0).click()
        for wanted in ("teacher's shift +1.50 nats", "student's shift −0.50 nats", "raw student", "75.0 %"):
            assert wanted in card.inner_text()
        page.keyboard.press("ArrowRight")
        assert "teacher's shift not finite" in card.inner_text()
        page.keyboard.press("Escape")
        assert card.is_hidden()
        page.select_option("#view-row", index=1)
        assert page.locator("#view-prompt").inner_text() == "Second\nprompt"
        browser.close()
    assert said == []
