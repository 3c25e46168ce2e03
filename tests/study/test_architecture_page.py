"""The page of `sd arch`: what is in it, and how it behaves in a browser where there is one."""

import re
from collections import Counter
from pathlib import Path

import pytest
from browser import Reader
from conftest import TINY

from convert.layouts.joined import keys_in_files
from convert.layouts.names import original_names
from sd.config import SD_V1, SD_V2_DEPTH, SDXL, SDXL_REFINER
from sd.networks.block_plan import block_plan
from sd.study.architecture.description import Node, describe
from sd.study.architecture.folding import Fold, folded
from sd.study.architecture.page import Section, page
from sd.study.architecture.pieces import amount
from sd.study.architecture.sentences import sentence
from sd.study.architecture.table import blocks

ROOT = Path(__file__).parents[2]


def check_page(text):
    """Elements are closed in order, ids are unique, and nothing is fetched from anywhere."""
    read = Reader(text)
    assert read.wrong == []
    assert len(read.values("id")) == len(set(read.values("id")))
    assert not re.search(r"https?:|@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", text)
    assert all(source.startswith("data:") for source in read.values("src"))
    assert read.values("href", "link") == ["data:,"]
    assert all(href.startswith("#") for href in read.values("href", "a"))
    (policy,) = [attrs["content"] for _, attrs in read.elements if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none'")


LOOKS = pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (390, "light"), (1280, "dark")])


def check_window(browser, path, width, scheme, use):
    """Opened and used, the page fits the window, and there are no warnings and no requests."""
    browser.requests.clear()
    browser.problems.clear()
    browser.open(path, width=width, height=844, scheme=scheme)
    use()
    assert browser.run("document.documentElement.scrollWidth") <= width
    dark = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert dark == (scheme == "dark")
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [path.resolve().as_uri()]


@pytest.fixture(scope="module")
def full():
    return describe(SD_V1, original_names(SD_V1), width=512, height=512)


@pytest.fixture(scope="module")
def read(full):
    return Reader(page(full))


def test_every_module_is_one_element_that_opens_and_links_lead_somewhere(full, read):
    check_page(page(full))
    paths = [node.path for network in full.networks for node in network.walk() if node is not network]
    assert [attrs["id"] for tag, attrs in read.elements if attrs.get("class") == "node"] == paths
    assert [attrs["id"] for _, attrs in read.elements if attrs.get("class") == "fold"] == [
        "text_encoder.layers.0-11",
        *(f"vae.decoder.up.{level}.residuals.0-2" for level in (3, 2)),
    ]
    inside = [href for href in read.values("href", "a") if href.startswith("#")]
    assert len(inside) > 60
    assert {href[1:] for href in inside} <= set(read.values("id"))


def test_every_weight_stands_once_by_our_name_and_once_by_its_original_key(read):
    ours, originals = read.cells[0::3], read.cells[1::3]
    assert Counter(ours) == Counter(list(original_names(SD_V1)))
    assert Counter(originals) == Counter(original.name for original in original_names(SD_V1).values())
    there = dict(zip(ours, read.cells[2::3], strict=True))
    assert there["unet.out.conv.weight"] == "4 × 320 × 3 × 3"
    assert there["unet.input_blocks.1.attention.proj_in.weight"] == "320 × 320original: 320 × 320 × 1 × 1"


def test_the_whole_model_comes_first_and_each_part_of_it_is_a_link(full, read):
    text = page(full)
    assert text.index('class="drawing wide"') < text.index('class="drawing tall"') < text.index("<section")
    for block in block_plan(SD_V1.unet):
        assert read.values("href", "a").count(f"#unet.{block.name}") >= 3  # in both drawings, and in the figure
    for target in ("unet.time_embed", "vae.decoder", "part-guidance", "part-sampler"):
        assert read.values("href", "a").count(f"#{target}") >= 2


def test_every_module_says_in_a_sentence_what_it_does(full):
    check_sentences(full)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SD_V2_DEPTH, SDXL, SDXL_REFINER])
def test_every_module_of_other_families_says_what_it_does(config):
    described = describe(config, keys_in_files(config), width=256, height=256)
    check_sentences(described)
    check_page(page(described))


def check_sentences(full):
    nodes = [node for network in full.networks for node in network.walk()]
    for node in nodes:
        assert re.fullmatch(r"[A-Z0-9][^\n]{14,200}\.", sentence(node)), node.path
    said = {node.path: sentence(node) for node in nodes}
    causal = {path for path, text in said.items() if "the tokens before it" in text and path.endswith("attention")}
    assert {path.partition(".")[0].removesuffix("_2") for path in causal} == {"text_encoder"}
    for path, text in said.items():
        if path.startswith("unet.output_blocks") and path.count(".") == 2:
            layers = {node.path.removeprefix(f"{path}.") for node in nodes if node.path.startswith(f"{path}.")}
            assert ("prompt" in text) == ("attention" in layers)
            assert ("doubles the sides" in text) == ("upsample" in layers)


def test_blocks_name_their_chapter_and_link_to_it_where_the_course_is(full):
    assert "Chapter 4 of the course: The UNet, block by block" in page(full)
    outside = [href for href in Reader(page(full, course="docs/course")).values("href", "a") if href[0] != "#"]
    assert len(outside) > 50
    assert {ROOT / href for href in outside} <= set((ROOT / "docs/course").glob("*.md"))
    assert {href[12] for href in outside} == set("123456")


def test_layers_are_folded_only_where_they_are_alike(full):
    unet, vae = full.networks[1:]
    assert [type(each) for each in folded(unet.children)] == [Node] * len(unet.children)  # skips differ
    (encoder,) = [each for each in folded(full.networks[0].children) if isinstance(each, Fold)]
    assert (encoder.times, encoder.parameter_count, encoder.path) == (12, 85_054_464, "text_encoder.layers.0-11")
    assert encoder.operations == full.networks[0].operations
    residuals = {node.path: node.children for node in vae.walk() if node.path.endswith("residuals")}
    (alike,) = folded(residuals["vae.decoder.up.2.residuals"])
    assert alike.times == 3
    assert len(list(folded(residuals["vae.decoder.up.1.residuals"]))) == 3  # the first has another number of channels


def test_source_lines_are_links_where_a_prefix_is_given(full):
    text = page(full, source_url="https://example.org/blob/main/")
    hrefs = Reader(text).values("href", "a")
    outside = [href for href in hrefs if not href.startswith("#")]
    nodes = [node for network in full.networks for node in network.walk()]
    assert outside == [f"https://example.org/blob/main/{node.file}#L{node.line}" for node in nodes]
    hostile = Reader(page(full, source_url='"><script>alert(1)</script>'))
    assert sum(tag == "script" for tag, _ in hostile.elements) == 1


def test_skips_lie_in_one_row_of_the_figure_and_blocks_in_the_order_in_which_they_run(full):
    unet = full.networks[1]
    order = list(blocks(unet))
    places = {block.path: (row, column) for block, row, column, _ in Section(unet, None).places(order)}
    assert list(places) == [block.path for block in order]
    for i in range(12):
        row, column = places[f"unet.input_blocks.{i}"]
        assert column == 1
        assert places[f"unet.output_blocks.{11 - i}"] == (row, 2)
    assert places["unet.time_embed"] == (1, 1)
    assert places["unet.out"] == (1, 2)
    assert places["unet.middle_block"] == (14, 0)
    assert sorted(row for row, column in places.values() if column == 1) == list(range(1, 14))


def test_times_stand_in_the_page_only_where_they_were_measured(full):
    assert " ms<" not in page(full)
    times = {"unet.middle_block": 12.3456}
    measured = describe(TINY, original_names(TINY), width=64, height=64, milliseconds=times, measured_on="cpu, fp32")
    text = page(measured)
    assert text.count("12.346 ms") == 1
    assert "times measured on cpu, fp32" in text


def test_amounts_have_three_figures_and_a_unit():
    found = [amount(number) for number in (0, 999, 1000, 15_746_560, 803_273_441_280, 3.63e12)]
    assert found == ["0", "999", "1 k", "15.7 M", "803 G", "3.63 T"]


@pytest.fixture(scope="module")
def path(full, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "architecture.html"
    path.write_text(page(full), encoding="utf-8")
    return path


IS_OPEN = "document.getElementById('{}').open"


def test_click_on_a_tile_opens_its_block_and_marks_the_tile(browser, path):
    browser.open(path)
    assert browser.run("document.querySelectorAll('details[open]').length") == 0
    browser.click('a.tile[href="#unet.input_blocks.4"]')
    assert browser.run(IS_OPEN.format("unet.input_blocks.4"))
    assert browser.run("document.activeElement.parentElement.id") == "unet.input_blocks.4"
    assert browser.run("[...document.querySelectorAll('.tile.open')].map(tile => tile.hash)") == [
        "#unet.input_blocks.4"
    ]
    browser.click('[id="unet.input_blocks.4"] > summary')
    assert not browser.run(IS_OPEN.format("unet.input_blocks.4"))
    assert browser.run("document.querySelectorAll('.tile.open').length") == 0
    browser.click('a.tile[href="#unet.input_blocks.4"]')  # the address stays the same
    assert browser.run(IS_OPEN.format("unet.input_blocks.4"))


def test_blocks_of_the_whole_model_open_by_click_and_by_key(browser, path):
    shown = "[...document.querySelectorAll('.drawing')].map(each => each.getClientRects().length)"
    for width, form, seen in ((1280, "wide", [1, 0]), (390, "tall", [0, 1])):
        browser.open(path, width=width)
        assert browser.run(shown) == seen
        browser.click(f'.{form} a[href="#unet.input_blocks.7"] rect')
        assert browser.run(IS_OPEN.format("unet.input_blocks.7"))
        browser.run("document.getElementById('unet.input_blocks.7').open = false")
        browser.click(f'.{form} a[href="#unet.input_blocks.7"] rect')  # the address stays the same
        assert browser.run(IS_OPEN.format("unet.input_blocks.7"))
        browser.run(f"document.querySelector('.{form} a[href=\"#vae.decoder\"]').focus()")
        browser.press("Enter")
        assert browser.run("document.activeElement.parentElement.id") == "vae.decoder"
        said = browser.run(f"document.querySelector('.{form} a[href=\"#unet.input_blocks.7\"] title').textContent")
        assert said.startswith("Works at 16 × 16 places")


def test_keyboard_opens_and_closes_a_module(browser, path):
    browser.open(path)
    browser.run("document.querySelector('a.tile[href=\"#unet.middle_block\"]').focus()")
    browser.press("Enter")
    assert browser.run(IS_OPEN.format("unet.middle_block"))
    browser.press("Tab")  # to the first module inside
    assert browser.run("document.activeElement.tagName") in ("SUMMARY", "A")
    browser.run("document.querySelector('[id=\"unet.middle_block.attention\"] > summary').focus()")
    for key in "Enter", " ":
        browser.press(key)
        assert browser.run(IS_OPEN.format("unet.middle_block.attention"))
        browser.press(key)
        assert not browser.run(IS_OPEN.format("unet.middle_block.attention"))


def test_screen_readers_learn_what_is_open_and_where_skips_come_from(browser, path):
    browser.open(path)
    browser.call("Accessibility.enable")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    said = [(node["role"]["value"], node["name"]["value"], node) for node in nodes if node.get("name", {}).get("value")]
    (tile,) = [name for role, name, _ in said if role == "link" and name.startswith("output_blocks.5:")]
    assert tile == "output_blocks.5: residual, attention, upsample; gives 1280 × 32 × 32; skip from input_blocks.6"
    (summary,) = [node for _, name, node in said if name.startswith("output_blocks.5 residual, attention, upsample ")]
    assert "90.5 M parameters" in summary["name"]["value"]
    assert {"expanded": False}.items() <= {p["name"]: p["value"]["value"] for p in summary["properties"]}.items()
    assert any(role == "searchbox" and name == "Find a weight" for role, name, _ in said)


def test_weight_is_found_by_its_original_key_and_the_link_opens_all_around_it(browser, path):
    browser.open(path)
    key = "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_k.weight"
    browser.run(f"document.getElementById('find').focus(); document.execCommand('insertText', false, '{key}')")
    assert browser.run("document.querySelector('.find output').innerText.split('\\n')[0].trim()") == "1 found"
    browser.click(".find output a")
    parts = ["unet", "output_blocks", "5", "attention", "blocks", "0", "cross_attention", "k"]
    around = [".".join(parts[:n]) for n in (3, 4, 6, 7, 8)]
    assert [browser.run(IS_OPEN.format(name)) for name in around] == [True] * 5
    closed = "document.querySelectorAll('details:not([open])').length"
    number = browser.run(closed)
    browser.click("#text_encoder-section [data-open]")  # all of a network at once
    assert browser.run(closed) == number - 136
    browser.click("#text_encoder-section [data-close]")
    assert browser.run(closed) == number


@LOOKS
def test_page_fits_the_window_without_warnings_or_requests(browser, path, width, scheme):
    def open_and_search():
        browser.run("location.hash = '#unet.output_blocks.5.attention.blocks.0.cross_attention.k'")
        parts = '[id^="unet.output_blocks.5"], [id^=vae]'
        browser.run(f"document.querySelectorAll('{parts}').forEach(node => {{ node.open = true }})")
        browser.run("document.getElementById('find').focus(); document.execCommand('insertText', false, 'attention')")
        assert browser.run("document.querySelectorAll('details[open]').length") > 200

    check_window(browser, path, width, scheme, open_and_search)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(browser, path, scheme):
    """WCAG 2, success criterion 1.4.3: a contrast of at least 4.5."""
    browser.open(path, scheme=scheme)
    colours = browser.run(
        "(() => { const colour = name => { const e = document.body.appendChild(document.createElement('i'));"
        "e.style.color = `var(--${name})`; return getComputedStyle(e).color.match(/[0-9]+/g).map(Number) };"
        "return Object.fromEntries(['ink', 'soft', 'page', 'card', 'attention', 'residual', 'plain', 'strong']"
        ".map(name => [name, colour(name)])) })()"
    )

    def luminance(name):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colours[name])]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = [(front, back) for front in ("ink", "soft") for back in ("page", "card", "attention", "residual", "plain")]
    for front, back in [*pairs, ("strong", "page"), ("strong", "card")]:
        low, high = sorted((luminance(front), luminance(back)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back)
