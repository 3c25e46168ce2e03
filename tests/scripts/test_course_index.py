"""The ends of the course's chapters, its glossary, and its index of the equations that the code's comments cite."""

import ast
import io
import re
import tokenize
from functools import cache

import pytest
from test_course import CHAPTERS, COURSE, LINK, ROOT, blocks_of, shown_in_python

CITED = re.compile(r"\b(eq|algorithm)s?\.? ([0-9]+(?:(?:,? and |, | to )[0-9]+)*)")
TERM = re.compile(r"^- \*\*(.+?)\*\*: (.+?) \[Chapter [0-9]+\]\((\S+)\), \[(\S+)\]\((\S+)\)$")
ROW = re.compile(r"^\| ((?:eq\.|algorithm) [^|]*) \| ([^|]+) \| ([^|]+) \|$")
REPEATED = ROOT / "sd" / "study" / "explain" / "formulas.py"  # the samplers' sources again, for the page


def sections(page, level, within=None):
    """The headings of a level and the text below each."""
    text = page.read_text(encoding="utf-8") if within is None else within
    found = re.split(rf"^{'#' * level} (.+)$", text, flags=re.MULTILINE)[1:]
    return dict(zip(found[::2], found[1::2], strict=True))


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_a_chapter_ends_with_three_experiments_and_questions(page):
    headings = sections(page, 2)
    assert list(headings)[-2:] == ["Change this and look", "Check yourself"]
    experiments = sections(page, 3, headings["Change this and look"])
    assert len(experiments) == 3
    for title, text in experiments.items():
        code = re.findall(r"^```(?:python|sh)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        assert any("assert " in block or "# -> " in block for block in code), f"{title}: nothing is checked"
        assert len(re.findall(r"^\*\*Expect:\*\* \S", text, re.MULTILINE)) == 1, title
    questions = re.findall(
        r"^<details>\n<summary>([^\n]+\?)</summary>\n\n(.+?)\n\n</details>$",
        headings["Check yourself"],
        re.MULTILINE | re.DOTALL,
    )
    assert 3 <= len(questions) <= 5
    assert len(questions) == page.read_text(encoding="utf-8").count("<details>")


def test_numbers_that_an_experiment_prints_are_checked():
    """A line of dots alone would stand for anything."""
    for page in CHAPTERS:
        for block in blocks_of(page):
            vague = [line for line in shown_in_python(block.code) if line in ("...", "{...}", "[...]")]
            assert not vague or "assert " in block.code, f"{page.name}, line {block.line}"


def test_the_glossary_names_a_chapter_and_a_file_for_each_word():
    text = (COURSE / "glossary.md").read_text(encoding="utf-8")
    entries = re.sub(r"\n  ", " ", text).splitlines()
    entries = [entry for entry in entries if entry.startswith("- ")]
    terms = [TERM.match(entry) for entry in entries]
    assert len(entries) >= 60
    assert all(terms), [entry for entry, term in zip(entries, terms, strict=True) if not term]
    words = [term[1].lower() for term in terms]
    assert words == sorted(set(words))
    for term in terms:
        assert len(re.findall(r"[.:?](?= |$)", term[2])) <= 3, term[1]  # one or two sentences
        assert COURSE / term[3] in CHAPTERS, term[1]
        assert (COURSE / term[5]).resolve() == ROOT / term[4], term[1]
        assert (ROOT / term[4]).is_file(), term[1]


def texts_of(path):
    """The docstrings and comments of a file, each with the name of the innermost function or class around it."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)

    def named(node, prefix=""):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield prefix + child.name, child
                yield from named(child, f"{prefix}{child.name}.")

    nodes = list(named(tree))
    yield "", ast.get_docstring(tree) or ""
    for name, node in nodes:
        yield name, ast.get_docstring(node) or ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            around = [name for name, node in nodes if node.lineno <= token.start[0] <= node.end_lineno]
            yield (around[-1] if around else ""), token.string


@cache
def cited():
    """(file, function, equation) of each citation by number in `sd` -> the texts that it may be explained in."""
    found = {}
    for path in sorted((ROOT / "sd").rglob("*.py")):
        if path != REPEATED:
            texts = list(texts_of(path))
            for name, text in texts:
                for kind, numbers in CITED.findall(" ".join(text.split())):
                    found.setdefault((path, name, f"{kind} {numbers}"), []).extend([text, texts[0][1]])
    return found


def indexed():
    """The same from the index, each with its paper."""
    found = {}
    for heading, text in sections(COURSE / "equations.md", 2).items():
        for row in filter(None, map(ROW.match, text.splitlines())):
            kind, numbers = CITED.search(row[1]).groups()
            for label, link in re.findall(r"\[([^\]]+)\]\((\S+?)\)", row[3]):
                path = (COURSE / link).resolve()
                found[path, "" if label == path.name else label, f"{kind} {numbers}"] = heading
    return found


def test_the_index_has_each_equation_that_the_code_cites_and_no_other():
    """So a function that is renamed or gone fails here, and so does a new docstring with an equation."""
    found = indexed()
    assert len(found) >= 50
    missing, gone = set(cited()) - set(found), set(found) - set(cited())
    assert not missing, f"give these a row in docs/course/equations.md: {missing}"
    assert not gone, f"docs/course/equations.md has what no comment cites any more: {gone}"


def test_the_code_names_the_paper_under_which_the_index_has_it():
    for place, heading in indexed().items():
        authors, year = re.match(r"(.+) \(([0-9]{4})\): \w", heading).groups()
        told = " ".join(" ".join(cited()[place]).split())
        assert re.search(rf"{re.escape(authors)}.*?{year}", told), (place, heading)


def test_the_sources_that_the_explain_page_repeats_are_in_the_index():
    known = {(heading.partition(" (")[0], place[2]) for place, heading in indexed().items()}
    sources = re.findall(r'source="(.+?)"', REPEATED.read_text(encoding="utf-8"))
    parts = [part for source in sources for part in source.split("; ")]
    citations = [(part.partition(" (")[0], *CITED.search(part).groups()) for part in parts if CITED.search(part)]
    assert len(citations) >= 8
    numbers = {authors: " ".join(eq for other, eq in known if other == authors) for authors, _, _ in citations}
    for authors, kind, cited_numbers in citations:
        for number in re.findall(r"[0-9]+", cited_numbers):
            assert re.search(rf"\b{number}\b", numbers[authors]), (authors, kind, number)


def test_the_course_links_to_its_glossary_and_index():
    assert {"glossary.md", "equations.md"} <= set(LINK.findall((COURSE / "README.md").read_text(encoding="utf-8")))
