"""The documentation site: every link on it leads somewhere, it fetches nothing from elsewhere, and its search works."""

import functools
import http.server
import re
import sys
import threading
from collections import Counter
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import make_site
import pytest
from browser import Browser, find_browser
from source_pages import address
from test_course import LINK, ROOT, prose_of

FETCHES = {"script": "src", "img": "src", "iframe": "src", "source": "srcset", "link": "href"}


def test_links_of_the_staged_pages_lead_to_staged_pages_and_source(tmp_path):
    make_site.stage_docs(tmp_path)
    staged = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    source, found = re.compile(r"source/(.+?)(?:/index)?\.html"), 0
    for page in make_site.markdown_pages():
        place = page.relative_to(ROOT)
        for link in LINK.findall(prose_of(tmp_path / place)):
            path = link.partition("#")[0]
            if path and "://" not in link:
                target = (tmp_path / place.parent / path).resolve().relative_to(tmp_path.resolve()).as_posix()
                file = source.fullmatch(target)
                found += bool(file)
                assert (ROOT / file[1]).exists() if file else target in staged, (place, link)
    assert found > 50


def test_links_of_the_live_pages_lead_to_the_pages_of_the_site():
    links = {
        "../../../docs/course/6-guidance.md": "../docs/course/6-guidance.html",  # of sd explain and sd arch
        "../course/README.md": "../course/index.html",  # of sd play
        "SOURCE/sd/networks/unet.py#L58": "../source/sd/networks/unet.py.html#L58",
    }
    for link, expected in links.items():
        assert make_site.with_links_of_the_site(f'<a href="{link}">') == f'<a href="{expected}">'


def test_every_page_has_a_place_in_the_navigation():
    groups = [pages for group in make_site.navigation() for pages in group.values()]
    named = [page for pages in groups for page in ([pages] if isinstance(pages, str) else pages)]
    assert len(named) == len(set(named))
    pages = {page.relative_to(ROOT).as_posix() for page in make_site.markdown_pages()}
    assert set(named) == pages | {"live.md", "code.md"}


def test_what_is_missing_or_in_the_way_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "letters.txt").write_text("not a site")
    for name in ("material", "pdoc"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    assert make_site.main(["--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not a site" in line
    monkeypatch.setitem(sys.modules, "pdoc", None)
    assert make_site.main(["--out", str(tmp_path / "site")]) == 2
    assert "pip install '.[site]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in ("material", "pdoc"):
        pytest.importorskip(name, reason="the extra `site` installs it")
    out = tmp_path_factory.mktemp("built") / "site"
    assert make_site.main(["--out", str(out)]) == 0
    return out


class Page(HTMLParser):
    """What a page links to, what it fetches, its anchors, and how often each tag is in its article."""

    def __init__(self, text):
        super().__init__()
        self.links, self.fetched, self.anchors, self.tags, self._inside = [], [], set(), Counter(), False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self._inside |= tag == "article"
        self.tags[tag] += self._inside
        self.anchors |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        elif attrs.get(FETCHES.get(tag)) and attrs.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.append(attrs[FETCHES[tag]])

    def handle_endtag(self, tag):
        self._inside &= tag != "article"


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


@pytest.mark.slow
def test_every_link_leads_to_a_page_and_an_anchor_in_it(site, pages):
    assert len(pages) > 500
    for path, page in pages.items():
        for link in [*page.links, *page.fetched]:
            parts = urlsplit(link)
            if parts.scheme or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), (path, link)
            # pdoc also links inherited names, and the live pages make anchors while they run
            is_ours = not {"api", "pages", "play"} & {*target.relative_to(site).parts}
            if parts.fragment and target in pages and is_ours:
                assert unquote(parts.fragment) in pages[target].anchors, (path, link)


@pytest.mark.slow
def test_pages_fetch_nothing_from_elsewhere(pages):
    for path, page in pages.items():
        assert {urlsplit(link).scheme for link in page.fetched} <= {"", "data"}, path


@pytest.mark.slow
def test_lists_and_tables_are_those_that_github_shows(site, pages):
    """Python-Markdown and CommonMark differ in what begins a list."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    for source in make_site.markdown_pages():
        text = source.read_text(encoding="utf-8").replace("<details>", "\n<details>\n")
        expected, place = Page(f"<article>{markdown.render(text)}</article>").tags, source.relative_to(ROOT)
        shown = pages[site / (place.with_name("index") if place.stem == "README" else place).with_suffix(".html")].tags
        for tag in ("h2", "h3", "li", "ol", "ul", "tr", "td", "pre", "img", "details"):
            assert shown[tag] == expected[tag], (place, tag)


@pytest.mark.slow
def test_source_pages_show_every_line_of_a_file_with_its_number(pages, site):
    file = ROOT / "sd/networks/unet.py"
    numbers = {anchor for anchor in pages[site / address(file, ROOT)].anchors if re.fullmatch(r"L\d+", anchor)}
    assert numbers == {f"L{number}" for number in range(1, len(file.read_text().splitlines()) + 1)}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def served(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium in PATH")
    browser = Browser(executable, tmp_path_factory.mktemp("browser") / "profile")
    yield browser
    browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 820, 1400])
def test_pages_in_a_browser_fit_its_width_and_ask_only_their_own_server(served, browser, width):
    browser.requests.clear()
    browser.problems.clear()
    names = ("index", "live", "code", "docs/course/index", "docs/course/7-training", "docs/commands", "source/sd/index")
    for name in (*names, "source/sd/networks/unet.py", "api/index", "api/sd/sampling/schedule", "pages/explain"):
        browser.open(f"{served}{name}.html", width=width, scheme="dark" if width == 820 else "light")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth"), name
    assert browser.requests
    assert all(request.startswith((served, "data:", "blob:")) for request in browser.requests)
    assert not browser.problems


@pytest.mark.slow
@pytest.mark.parametrize("place", ["on a server", "on a disk"])
def test_the_search_finds_the_chapter_on_guidance(place, site, served, browser):
    browser.requests.clear()
    start = served if place == "on a server" else f"{site.as_uri()}/"
    browser.open(f"{start}index.html", width=1400)
    browser.run("document.querySelector('.md-search__input').focus()")
    browser.write("guidance")
    browser.press("End")  # the search reads the words when a key goes up
    links = "[...document.querySelectorAll('.md-search-result__link')].map(link => link.getAttribute('href'))"
    browser.wait_for(f"{links}.length")
    assert any("docs/course/6-guidance.html" in link for link in browser.run(links))
    assert all(request.startswith((start, "data:", "blob:")) for request in browser.requests)


@pytest.mark.slow
def test_the_search_of_the_api_finds_a_function(served, browser):
    browser.open(f"{served}api/index.html", width=1400)
    browser.run("document.querySelector('input[type=search]').focus()")
    browser.write("add_noise")
    browser.wait_for("document.querySelector('main').innerText.includes('sd.sampling.schedule')")


def test_the_script_says_how_to_use_it(capsys):
    with pytest.raises(SystemExit):
        make_site.main(["--help"])
    assert "open site/index.html" in capsys.readouterr().out
