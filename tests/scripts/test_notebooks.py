"""The notebooks made from the course: nothing is lost, links lead somewhere, and their code runs in a kernel."""

import json
import os
import re

import make_notebooks
import pytest
from test_course import BY_TIME, CHAPTERS, COURSE, PAGES, ROOT, blocks_of, commands_in, fits, shown_in_python

LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """Where they lie in a checkout: links go two folders up."""
    folder = ROOT / "build" / "notebooks"
    return {page.stem: make_notebooks.notebook(page, folder) for page in PAGES}


def sources(notebook, kind):
    return [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_every_block_that_runs_is_a_code_cell_and_the_text_around_it_is_kept(notebooks):
    for page in PAGES:
        notebook, blocks = notebooks[page.stem], blocks_of(page)
        code = [source for source in sources(notebook, "code") if source != make_notebooks.FIND_SD.rstrip("\n")]
        heads = {"python": "", "sh": "%%bash -e\n"}
        expected = [(heads[block.language] + block.code).strip() for block in blocks if block.language in heads]
        assert [source.strip() for source in code] == expected
        text = "\n".join(sources(notebook, "markdown"))
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("#") and not any(line in block.code for block in blocks):
                assert line in text.splitlines()
        assert all(block.code in text for block in blocks if block.language in ("text", "console"))


def test_links_from_a_notebook_lead_to_files_and_notebooks(notebooks):
    folder = ROOT / "build" / "notebooks"
    for name, notebook in notebooks.items():
        for cell in notebook["cells"]:
            for link in LINK.findall(cell["source"]) if cell["cell_type"] == "markdown" else ():
                path, _, anchor = link.partition("#")
                if link.startswith("attachment:"):
                    assert link.removeprefix("attachment:") in cell["attachments"], link
                elif path.endswith(".ipynb") or not path:
                    target = notebooks[path.removesuffix(".ipynb") or name]
                    headings = re.findall(r"^#+ (.*)$", "\n".join(sources(target, "markdown")), re.MULTILINE)
                    assert not anchor or anchor in {heading.replace(" ", "-") for heading in headings}, link
                elif "://" not in link:
                    assert (folder / path).resolve().exists(), link


def test_pictures_are_stored_in_the_notebooks(notebooks):
    stored = {
        name for notebook in notebooks.values() for cell in notebook["cells"] for name in cell.get("attachments", ())
    }
    assert {path.name for path in (COURSE / "figures").iterdir()} <= stored


def test_making_them_again_gives_the_same_files(tmp_path, capsys):
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert make_notebooks.main(["--out", str(folder)]) == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(f"{page.stem}.ipynb" for page in PAGES)
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "a" / "README.ipynb")
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        ids = [cell["id"] for cell in json.loads((tmp_path / "a" / name).read_text(encoding="utf-8"))["cells"]]
        assert len(set(ids)) == len(ids)


def printed(cell):
    """The lines that a cell printed to stdout."""
    text = "".join(part["text"] for part in cell.outputs if part.output_type == "stream" and part.name == "stdout")
    return text.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("page", BY_TIME, ids=lambda page: page.stem)
def test_a_notebook_is_valid_and_its_kernel_prints_what_the_cells_say(page, notebooks, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbclient and ipykernel run the notebooks")
    client = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # the kernel is a process of its own
    notebook = nbformat.from_dict(notebooks[page.stem])
    nbformat.validate(notebook)
    where = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=where).execute()
    compared = 0
    for cell in notebook.cells:
        if cell.cell_type == "code" and not cell.source.startswith("%%bash"):
            shown = shown_in_python(cell.source)
            assert fits(shown, printed(cell)), (cell.source, printed(cell))
            compared += len(shown)
        elif cell.cell_type == "code":
            shown = [line for _, lines in commands_in(cell.source.partition("\n")[2]) for line in lines]
            assert not shown or set(shown) <= set(printed(cell)) or fits(shown, printed(cell)), cell.source
    assert compared >= (2 if page in CHAPTERS else 1)
