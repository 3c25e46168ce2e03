"""The drawing of a whole model: what is in it, and whether it can be read."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import TINY

from sd.config import FAMILIES, SD_V1, SD_V1_EDIT, SD_V2, SDXL
from sd.networks.block_plan import block_plan
from sd.study.architecture.drawing import drawing

DOCS = Path(__file__).parents[2] / "docs"
SVG = "{http://www.w3.org/2000/svg}"


def texts_of(config, **how):
    return [element.text for element in ElementTree.fromstring(drawing(config, **how)).iter(f"{SVG}text")]


@pytest.mark.parametrize(("file", "tall"), [("architecture.svg", False), ("architecture-tall.svg", True)])
def test_the_pictures_in_the_docs_are_what_the_script_draws(file, tall):
    assert (DOCS / file).read_text(encoding="utf-8") == drawing(SD_V1, tall=tall) + "\n"


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("config", [SD_V1, SDXL, TINY], ids=["v1", "xl", "tiny"])
def test_every_block_is_a_link_with_its_channels(config, tall):
    drawn = ElementTree.fromstring(drawing(config, tall=tall, target=lambda path: (f"#{path}", path.upper())))
    links = {a.get("href"): [text.text for text in a.iter(f"{SVG}text")] for a in drawn.iter(f"{SVG}a")}
    for row in block_plan(config.unet):
        assert links[f"#unet.{row.name}"][1] == str(row.out_channels)
    assert drawn.find(f".//{SVG}a[@href='#guidance']/{SVG}title").text == "GUIDANCE"
    assert links["#unet.output_blocks.5"][0] == "output 5"
    assert {"#text_encoder", "#unet", "#unet.time_embed", "#vae.decoder", "#guidance", "#sampler"} < set(links)
    assert ElementTree.fromstring(drawing(config, tall=tall)).find(f".//{SVG}a") is None


def test_guidance_has_two_predictions_and_three_where_a_picture_is_edited():
    assert {"ε with prompt", "ε without", "(ε with − ε without)", "Timestep", "999 … 0"} <= set(texts_of(SD_V1))
    assert "ε without + 7.5 × (ε with − ε without)" in texts_of(SD_V1, tall=True)
    assert {"v with prompt", "v without", "v: the predicted velocity"} <= set(texts_of(SD_V2))
    assert {"ε with both", "ε picture", "ε neither", "+ picture"} <= set(texts_of(SD_V1_EDIT))


@pytest.mark.slow
@pytest.mark.parametrize("tall", [False, True])
def test_texts_fit_their_boxes_and_can_be_read_on_a_phone(browser, tmp_path, tall):
    inside = (
        "(() => { const found = []; for (const box of document.querySelectorAll('g, a')) {"
        "const room = box.querySelector('rect')?.getBBox(); if (room)"
        "for (const text of box.querySelectorAll('text')) {"
        "const own = text.getBBox(); if (own.x < room.x + 3 || own.x + own.width > room.x + room.width - 3 ||"
        "own.y < room.y || own.y + own.height > room.y + room.height + 1) found.push(text.textContent) } }"
        "return found })()"
    )
    for name, config in FAMILIES.items():
        page = tmp_path / f"{name}.html"
        meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><body style="margin: 13px">'
        page.write_text(meta + drawing(config, tall=tall), encoding="utf-8")
        browser.open(page, width=390 if tall else 1100)
        assert browser.run(inside) == [], name
        scale = browser.run("document.querySelector('svg').getBoundingClientRect().width") / (400 if tall else 1084)
        assert 12 * scale > 10.9  # pixels of the smallest text
        assert browser.run("document.documentElement.scrollWidth") <= (390 if tall else 1100)
