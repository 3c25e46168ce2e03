"""The page of `sd play` as files: its parts fit together, and nothing comes from elsewhere."""

import re
from pathlib import Path

import pytest
from browser import Reader

from sd.study.chapters import CHAPTERS
from sd.study.play.page import TEMPLATE_FILE, index_page

WEB = TEMPLATE_FILE.parent
COURSE = Path(__file__).parents[2] / "docs/course"
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in WEB.glob("page*.js")}
TEXT = "".join(SCRIPTS.values())


@pytest.fixture(scope="module")
def read():
    return Reader(index_page(course="../course"))


def test_elements_are_closed_in_order_and_ids_are_unique(read):
    assert read.wrong == []
    ids = read.values("id")
    assert len(ids) == len(set(ids))
    for name in ("for", "aria-controls", "aria-labelledby", "aria-describedby"):
        assert {each for value in read.values(name) for each in value.split()} <= set(ids)


def test_scripts_use_elements_terms_and_modules_that_there_are(read):
    ids = set(read.values("id"))
    assert set(re.findall(r'\b(?:byId|on)\("([\w-]+)"[,)]', TEXT)) <= ids
    assert {f"term-{name}" for name in read.values("data-term")} <= ids
    assert {f"term-{name}" for name in re.findall(r'\b(?:row|term)\("\S+", "(\w+)"', TEXT)} <= ids
    imported = set(re.findall(r'from "\./([\w.]+)"', TEXT))
    assert imported - {"client.js"} == SCRIPTS.keys() - {"page.js"}


def test_nothing_is_fetched_from_elsewhere_and_no_text_becomes_markup(read):
    files = index_page() + TEXT + (WEB / "page.css").read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(|innerHTML|insertAdjacentHTML|document\.write|\beval\(", files)
    (policy,) = [attrs["content"] for _, attrs in read.elements if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none'")
    assert "unsafe-inline" not in policy
    assert {*read.values("src"), *read.values("href", "link")} == {"from_disk.js", "page.js", "page.css", "data:,"}


def test_controls_have_names(read):
    labelled = set(read.values("for", "label"))
    for tag, attrs in read.elements:
        named = attrs.get("aria-label") or attrs.get("aria-labelledby") or attrs.get("id") in labelled
        if tag in ("input", "select", "textarea", "progress") and attrs.get("type") not in ("checkbox", "radio"):
            assert named, attrs  # a checkbox and a radio button stand inside their labels
        if attrs.get("role") in ("img", "group", "radiogroup", "tablist", "tabpanel"):
            assert named, attrs


def test_every_task_has_a_chapter_and_chapters_are_links_where_the_course_is_known(read):
    tasks = re.findall(r'title: "([^"]+)", chapter: (\d+)', SCRIPTS["page_tasks.js"])
    assert len(tasks) >= 8
    assert set(range(1, 9)) <= {int(number) for _, number in tasks} <= CHAPTERS.keys()
    for title, number in tasks:
        chapter = " ".join((COURSE / CHAPTERS[int(number)][0]).read_text(encoding="utf-8").split())
        assert f"“{title}”" in chapter[: chapter.index("##")]
        assert f"| {title} | [{number}. " in (COURSE.parent / "play.md").read_text(encoding="utf-8")
    links = {href for href in read.values("href", "a") if not href.startswith("#")}
    assert links == {f"../course/{file}" for file, _ in CHAPTERS.values()}
    for number, (file, title) in CHAPTERS.items():
        assert (COURSE / file).read_text(encoding="utf-8").startswith(f"# {number}. {title}")
    assert Reader(index_page()).values("href", "a") == []
