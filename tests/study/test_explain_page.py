"""The page of `sd explain`: what is in it, and how it behaves in a browser where there is one."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from browser import data_of
from test_architecture_page import LOOKS, Reader, check_page, check_window
from test_explain import settings

from sd.study.chapters import CHAPTERS, chapters, where
from sd.study.explain.page import MORE, TERMS, embedded, page, schedule_drawing
from sd.study.explain.recording import explain
from sd.study.explain.report import Comparison, report

HOSTILE = 'a red </script><script>alert("x")</script> $title & <b>circle</b>'


@pytest.fixture(scope="module")
def told(model):
    asked = settings(prompt="a red circle, Hokusai", negative_prompt="blurry", steps=4)
    with torch.no_grad():
        run, other = explain(model, asked), explain(model, replace(asked, seed=6, steps=3), attention=False)
        return report(model, run, [Comparison(name="seed", labels=("5", "6"), runs=(run, other))])


@pytest.fixture(scope="module")
def read(told):
    return Reader(page(told))


def test_elements_are_closed_in_order_and_controls_have_labels(told, read):
    check_page(page(told))
    assert set(re.findall('data-term="([a-z_0-9]+)"', page(told))) <= set(TERMS)
    labelled = [attrs for tag, attrs in read.elements if tag in ("input", "svg", "canvas")]
    assert len(labelled) == 3
    assert all(attrs.get("aria-label") for attrs in labelled)
    assert all(attrs.get("alt") for tag, attrs in read.elements if tag == "img")


def test_a_prompt_is_text_whatever_it_says(told):
    hostile = page({**told, "settings": {**told["settings"], "prompt": HOSTILE, "negative_prompt": HOSTILE}})
    assert sum(tag == "script" for tag, _ in Reader(hostile).elements) == 2
    assert data_of(hostile)["settings"]["prompt"] == HOSTILE
    assert "<b>circle" not in hostile
    assert "<" not in embedded({"prompt": HOSTILE})


def test_chapters_are_links_where_the_course_is_known_and_titles_elsewhere(told):
    course = Path(__file__).parents[2] / "docs/course"
    for number, (file, title) in CHAPTERS.items():
        assert (course / file).read_text(encoding="utf-8").startswith(f"# {number}. {title}")
    used = {number for _, _, number in TERMS.values() if number} | {each for some in MORE.values() for each in some}
    outside = [href for href in Reader(page(told, course="../docs/")).values("href", "a") if not href.startswith("#")]
    assert set(outside) == {f"../docs/{CHAPTERS[number][0]}" for number in used}
    assert (
        chapters((2, 6), None)
        == "Chapter 2 of the course: The VAE<br>Chapter 6 of the course: Classifier-free guidance"
    )
    assert where(None) in page(told)
    assert where(None) not in page(told, course="../docs/")


@pytest.mark.parametrize(
    ("guidance", "image_guidance", "said"),
    [(1, None, "predicts once"), (3, None, "ε without + 3 · (ε with"), (4, 1.5, "scales, 4 and 1.5"), (4, 1, "twice")],
)
def test_the_part_of_the_unet_says_how_guidance_works_here(told, guidance, image_guidance, said):
    changed = {"guidance_scale": guidance, "image_guidance": image_guidance}
    assert said in page({**told, "settings": {**told["settings"], **changed}})


def test_dots_lie_on_the_curve_of_the_schedule(told):
    drawing = schedule_drawing(told["curve"], told["steps"])
    dots = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawing)]
    path = [tuple(map(float, point.split())) for point in re.search(r'd="M([^"]*)"', drawing)[1].split(" L")]
    assert len(dots) == 4
    assert sorted(dots) == dots  # from left to right as time goes on
    for x, y in dots:
        near = [point for point in path if abs(point[0] - x) <= 4]
        assert min(abs(point[1] - y) for point in near) < 3


@pytest.fixture(scope="module")
def path(told, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "explain.html"
    path.write_text(page(told), encoding="utf-8")
    return path


NUMBER = r"\d+(\.\d+)?(e[-+]?\d+)?"
NOW = "document.getElementById('now').textContent"
SHOWN = "document.querySelector('[data-picture={}]').src"
HEAT = "[...document.getElementById('map').getContext('2d').getImageData(0, 0, 18, 16).data].reduce((a, b) => a + b, 0)"


def test_arrow_keys_and_buttons_move_the_step_and_all_that_belongs_to_it(browser, path, told):
    browser.open(path)
    assert browser.run(NOW).startswith("step 1 of 4")
    browser.press("ArrowRight")
    assert browser.run(NOW).startswith("step 2 of 4")
    browser.click("#film button:nth-child(4)")
    assert browser.run(NOW).startswith("step 4 of 4")
    assert browser.run("document.querySelector('#film [aria-current]').innerText") == "4"
    browser.press("ArrowLeft")
    browser.click("#back")
    assert browser.run(NOW).startswith("step 2 of 4, timestep ")
    step = told["steps"][1]
    for name, uri in step["pictures"].items():
        assert browser.run(SHOWN.format(name)) == uri
    assert not browser.run(
        "document.getElementById('step-numbers').open || document.getElementById('step-formula').open"
    )
    numbers = browser.run("document.getElementById('numbers').textContent")
    for value in (
        step["timestep"],
        step["alpha_bar"],
        step["sigma"],
        step["norms"]["x_t"],
        step["norms"]["difference"],
    ):
        assert f"{float(f'{value:.3g}'):.10g}" in numbers
    assert browser.run("document.querySelector('circle.now').dataset.step") == "2"
    formula = browser.run("document.getElementById('formula').textContent")
    rounded = [
        re.sub(NUMBER, lambda found: f"{float(f'{float(found[0]):.3g}'):.10g}", line)
        for line in step["formula"]["numbers"]
    ]
    assert all(line in formula for line in (*step["formula"]["symbols"], *rounded))
    other = told["comparisons"][0]["runs"][1]["steps"]
    assert browser.run("document.querySelectorAll('[data-run]')[1].src") == other[round(1 * 2 / 3)]["picture"]
    browser.run("document.getElementById('step').focus()")
    browser.press("ArrowRight")
    assert browser.run(NOW).startswith("step 3 of 4")


def test_the_run_plays_once_when_opened_unless_motion_is_unwanted(browser, path):
    browser.open(path, motion="no-preference")
    browser.wait_for("byId('play').ariaPressed === 'false' && slider.value === '4'")
    browser.open(path, motion="no-preference")
    browser.click("#back")
    assert browser.run("byId('play').ariaPressed") == "false"
    browser.open(path)
    assert browser.run("[slider.value, byId('play').ariaPressed]") == ["1", "false"]


def test_each_part_of_the_machine_unfolds_alone(browser, path):
    browser.open(path)
    shown = "[...document.querySelectorAll('.panel:not([hidden])')].map(panel => panel.id)"
    parts = browser.run("parts.map(button => button.getAttribute('aria-controls'))")
    assert [part.removeprefix("part-") for part in parts] == [
        "prompt",
        "tokens",
        "vectors",
        "noise",
        "unet",
        "vae",
        "picture",
    ]
    assert browser.run(shown) == []
    for place, part in enumerate(parts, start=1):
        browser.click(f"#machine li:nth-child({place}) button")
        assert browser.run(shown) == [part]
        assert browser.run("document.querySelectorAll('#machine [aria-expanded=true]').length") == 1
    browser.click("#machine li:nth-child(7) button")
    assert browser.run(shown) == []


def test_a_term_is_explained_when_focused_or_clicked_until_escape(browser, path):
    browser.open(path, width=390)
    told = "document.getElementById('tip')?.innerText ?? ''"
    browser.run("document.querySelector('main [data-term=x0]').focus()")
    assert browser.run(told).startswith("x̂₀, x-zero hat")
    assert browser.run("document.activeElement.getAttribute('aria-describedby')") == "tip"
    browser.press("Escape")
    assert browser.run(told) == ""
    browser.run("byId('step-numbers').open = true")
    browser.click("#numbers [data-term=sigma]")
    assert browser.run(told).startswith("σ, sigma")
    assert "Chapter 5" in browser.run(told)
    box = browser.run("document.getElementById('tip').getBoundingClientRect().toJSON()")
    assert box["left"] >= 0
    assert box["right"] <= 390
    browser.click("h1")
    assert browser.run(told) == ""


def test_play_begins_anew_at_the_end_and_stops_there(browser, path):
    browser.open(path)
    browser.run("go(4)")
    browser.run(
        "window.seen = []; new MutationObserver(() => seen.push([slider.value, byId('play').ariaPressed]))"
        ".observe(byId('now'), {childList: true})"
    )
    browser.press(" ")
    browser.run("new Promise(done => setInterval(() => byId('play').ariaPressed === 'false' && done(), 50))")
    assert browser.run("seen") == [["1", "true"], ["2", "true"], ["3", "true"], ["4", "true"]]
    assert browser.run("byId('play').textContent") == "play"


def test_click_on_a_word_shows_its_map_and_its_share(browser, path, told):
    browser.open(path)
    words = browser.run("[...document.querySelectorAll('#strip button')].map(button => button.innerText)")
    assert words[0].split() == ["start", "49406"]
    assert [word.split()[0] for word in words[1:6]] == ["a", "red", "circle", ",", "ho"]
    assert words[5].split() == ["ho", "606", "ku", "1836", "sai", "10886"]
    assert words[7].split()[-3:] == ["68", "×", "49407"]
    assert browser.run("document.querySelector('#strip [aria-pressed=true]').innerText") == words[3]  # the first noun
    browser.run("go(4)")
    browser.click("#strip button:nth-child(2)")
    before = browser.run(HEAT)
    assert browser.run("new Set([...document.querySelectorAll('#strip canvas')].map(c => c.toDataURL())).size") > 5
    browser.click("#strip button:nth-child(4)")
    assert browser.run("[...document.querySelectorAll('#strip [aria-pressed=true]')].map(b => b.innerText)") == [
        words[3]
    ]
    assert browser.run(HEAT) != before
    share = 100 * told["steps"][3]["shares"][4][3]
    assert browser.run("document.getElementById('said').textContent").startswith(
        f"“circle” gets {float(f'{share:.3g}'):.10g} % of the attention"
    )
    seen = {browser.run(HEAT)}
    for menu, value in (("head", "3"), ("where", "1"), ("when", "all"), ("how", "beside")):
        browser.run(
            f"(() => {{ const menu = document.getElementById('{menu}'); menu.value = '{value}';"
            "menu.dispatchEvent(new Event('change')) })()"
        )
        seen.add(browser.run(HEAT))
    assert len(seen) == 5
    assert "mean of all steps, 5 × 4, 5 layers; the map is that of head 4" in browser.run(
        "document.getElementById('said').textContent"
    )


def test_screen_readers_learn_what_the_controls_are(browser, path):
    browser.open(path)
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    browser.call("Accessibility.enable")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    said = {(node["role"]["value"], node["name"]["value"]) for node in nodes if node.get("name", {}).get("value")}
    assert ("slider", "Step") in said
    assert {("button", "play"), ("button", "one step back"), ("button", "one step on")} <= said
    assert ("image", "Predicted clean picture") in said
    assert any(role == "combobox" and name.startswith("Resolution") for role, name in said)
    assert any(role == "image" and name.startswith("Heat map: “circle”") for role, name in said)


@LOOKS
def test_page_fits_the_window_without_warnings_or_requests(browser, path, width, scheme):
    check_window(browser, path, width, scheme, lambda: browser.press("ArrowRight"))
