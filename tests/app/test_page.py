"""The page at /: what is in it, and how it behaves in a browser, with a live server of the narrow model."""

import base64
import hashlib
import json
import re
import shutil

import page_in_browser
import pytest
from browser import Reader
from page_in_browser import SHOWN, SMALL, TILES, arrive, fill, make, pixels
from served import client, listening_server, working

from sd.app.web.guard import Rules
from sd.app.web.page import FILE

opened, url, worker = page_in_browser.opened, page_in_browser.url, page_in_browser.worker  # fixtures

TEXT = FILE.read_text(encoding="utf-8")
HOSTILE = '<img src=x onerror="document.title = 1"><script>document.title = 1</script> a (red:1.3) circle'
LOOKS = [(width, scheme) for width in (320, 390, 820, 1400) for scheme in ("light", "dark")]


def test_policy_allows_this_script_and_this_style_and_nothing_else():
    answer = client(None).get("/")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    for tag in ("script", "style"):
        start = TEXT.index(f"<{tag}>") + len(tag) + 2
        digest = hashlib.sha256(TEXT[start : TEXT.index(f"</{tag}>")].encode()).digest()
        assert policy.pop(f"{tag}-src") == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert policy == {
        "img-src": "'self' data: blob:",
        "connect-src": "'self'",
        "require-trusted-types-for": "'script'",
        **dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"), "'none'"),
    }
    assert answer.text == TEXT


def test_elements_are_closed_in_order_and_controls_have_labels():
    read = Reader(TEXT)
    assert read.wrong == []
    assert len(read.values("id")) == len(set(read.values("id")))
    labelled = set(read.values("for", "label"))
    for tag, attributes in read.elements:
        if tag in ("textarea", "select", "canvas", "progress") or (
            tag == "input" and attributes.get("type") != "radio"
        ):
            assert attributes["id"] in labelled | {"models", "extra"} or attributes.get("aria-label"), attributes
    assert set(re.findall(r'(?:byId|on)\("([\w-]+)"', TEXT)) <= set(read.values("id"))


def test_nothing_is_fetched_from_elsewhere_and_no_text_becomes_markup():
    assert not re.search(r"https?:|@import|url\(|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", TEXT)
    assert not re.search(r"\son\w+=|style=\"", TEXT)


@pytest.mark.slow
def test_a_prompt_becomes_a_picture_and_previews_change_on_the_way(opened, worker):
    assert opened.run(SHOWN) is None
    opened.run("window.seen = new Set(); new MutationObserver(() => seen.add(byId('shown').src))"
               ".observe(byId('shown'), {attributeFilter: ['src']})")  # fmt: skip
    (sha256,) = make(opened, prompt="a green star", seed="7", steps="12")
    seen = opened.run("[...seen]")
    assert len([source for source in seen if source.startswith("data:image/")]) > 3
    assert seen[-1].startswith("blob:")
    assert opened.run(SHOWN) == seen[-1]
    assert opened.run(TILES) == ["a green star, seed 7"]
    assert "12 steps · DPM++ 2M" in opened.run("byId('facts').textContent")
    pixels(worker, sha256)
    assert worker.latest()[0].pictures[0].settings["steps"] == 12


@pytest.mark.slow
def test_several_pictures_come_one_by_one_and_one_can_be_skipped(opened):
    assert len(make(opened, seed="20", steps="2", count="3")) == 3
    assert opened.run(TILES) == [f"{opened.run('fields.prompt.value')}, seed {seed}" for seed in (22, 21, 20)]
    fill(opened, seed="30", steps="500", count="2")
    opened.click("#run")
    opened.wait_for("byId('left').textContent.startsWith('Picture 1 of 2, step')")
    opened.click("#skip")
    opened.wait_for("byId('left').textContent.startsWith('Picture 2 of 2, step')")
    opened.press("Escape")
    opened.wait_for("!jobs.size")
    assert len(opened.run(TILES)) == 3


@pytest.mark.slow
def test_stop_ends_a_job_and_one_that_waits(opened, worker):
    fill(opened, steps="1000")
    opened.click("#run")
    opened.wait_for("jobs.size === 1")  # the button moves as the progress appears
    opened.click("#run")
    opened.wait_for("jobs.size === 2 && byId('left').textContent.includes('1 more waiting')")
    opened.wait_for("byId('left').textContent.startsWith('Step ')")
    opened.click("#stop")
    opened.wait_for("jobs.size === 1")
    opened.press("Escape")
    opened.wait_for("!jobs.size")
    assert opened.run("byId('working').hidden && byId('stop').hidden")
    assert [job.state for job in worker.latest()[:2]] == ["stopped", "stopped"]
    assert opened.run(TILES) == []


@pytest.mark.slow
def test_more_jobs_than_a_browser_has_connections_are_all_finished(opened):
    fill(opened, steps="2", seed="40")
    for seed in range(40, 48):
        opened.run(f"fields.seed.value = {seed}; form.requestSubmit()")
    opened.wait_for(f"({TILES}).length === 8 && !jobs.size")


@pytest.mark.slow
def test_a_reload_keeps_the_gallery_and_the_form_and_a_click_puts_settings_back(opened, url):
    make(
        opened, prompt="a blue ring", negative_prompt="red", seed="60", steps="3", sampler="euler_a", guidance_scale="3"
    )
    make(opened, prompt="a white cross", negative_prompt="", seed="", steps="2")
    tiles = opened.run(TILES)
    arrive(opened, url)
    assert opened.wait_for(f"({TILES}).length === 2 && ({TILES})") == tiles
    assert opened.run("fields.prompt.value") == "a white cross"
    opened.click("#gallery li:last-child button")
    opened.wait_for("fields.seed.value === '60'")
    names = ("prompt", "negative_prompt", "steps", "sampler", "guidance_scale")
    kept = opened.run(f"{json.dumps(names)}.map(name => fields[name].value)")
    assert kept == ["a blue ring", "red", "3", "euler_a", "3"]


@pytest.mark.slow
def test_pictures_stay_when_the_server_has_forgotten_them_and_go_when_removed(opened, url, worker):
    make(opened, seed="70", steps="2", count="2")
    worker.jobs.clear()
    worker.memory._bytes.clear()
    arrive(opened, url)
    opened.wait_for(f"({TILES}).length === 2 && document.querySelector('#gallery li:last-child img').naturalWidth")
    opened.click("#forget")
    assert [text[-2:] for text in opened.run(TILES)] == ["70"]
    arrive(opened, url)
    opened.wait_for(f"({TILES}).length === 1")


@pytest.mark.slow
def test_a_setting_without_a_control_is_kept_and_can_be_removed(opened, worker):
    opened.run("byId('extra').focus()")
    opened.write("clip_skip=2")
    opened.press("Enter")
    make(opened, seed="80", steps="2")
    assert worker.latest()[0].pictures[0].settings["clip_skip"] == 2
    opened.click("#extras button")
    make(opened, seed="80", steps="2")
    assert "clip_skip" not in worker.latest()[0].pictures[0].settings
    opened.click("#gallery li:last-child button")
    opened.wait_for("extras.clip_skip === 2")


@pytest.mark.slow
def test_keys_alone_do_everything_from_prompt_to_picture_and_gallery(opened):
    for _ in range(20):
        opened.press("Tab")
        if opened.run("document.activeElement.id") == "prompt":
            break
    opened.run("document.activeElement.select()")
    opened.write("a black heart")
    fill(opened, steps="2", count="3", seed="90")
    opened.press("Enter", control=True)
    opened.wait_for(f"({TILES}).length === 3 && !jobs.size")
    reached = set()
    for _ in range(60):
        opened.press("Tab")
        reached.add(opened.run("document.activeElement.id || document.activeElement.closest('[id]')?.id"))
        if opened.run("gallery.contains(document.activeElement)"):
            break
    assert {"negative", "begin", "settings", "width", "sampler", "seed", "run", "use", "explain", "save"} <= reached
    where = "[...gallery.querySelectorAll('li:not(#live) button')].indexOf(document.activeElement)"
    for key, place in (("ArrowRight", 1), ("End", 2), ("ArrowLeft", 1), ("Home", 0), ("ArrowLeft", 0)):
        opened.press(key)
        assert opened.run(where) == place
    opened.press("ArrowRight")
    opened.press("Enter")
    opened.wait_for("fields.seed.value === '91'")
    opened.press("Delete")
    assert [label[-2:] for label in opened.run(TILES)] == ["92", "90"]
    assert opened.run("gallery.contains(document.activeElement)")
    outline = opened.run(
        "getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).outlineWidth"
    )
    assert outline == "solid3px"


@pytest.mark.slow
def test_a_prompt_with_markup_stays_text_everywhere(opened):
    before = opened.run("document.querySelectorAll('script, img').length")
    fill(opened, prompt=HOSTILE)
    opened.wait_for("byId('tokens').textContent.includes('×1.3')")
    make(opened, steps="2")
    assert opened.run("byId('caption').textContent") == HOSTILE
    assert opened.run(TILES)[0].startswith(HOSTILE)
    assert opened.run("document.querySelectorAll('script, img').length") == before + 1
    assert opened.run("document.title") == "sd-zoo"


@pytest.mark.slow
def test_tokens_show_words_weights_and_parts(opened):
    fill(opened, prompt="a (tyrannosaurus:1.4) in [fog]")
    opened.wait_for("byId('tokens').textContent.includes('fog')")
    tokens = opened.run("[...document.querySelectorAll('#tokens li')].map(item => [item.textContent, item.className])")
    assert [text for text, _ in tokens if "1.4" in text] == ["tyran ×1.4", "no ×1.4", "saurus ×1.4"]
    assert ["a", "begins ends"] in tokens
    assert [name for text, name in tokens if text.startswith("fog")] == ["begins ends less"]
    fill(opened, prompt="word " * 100)
    opened.wait_for("byId('count').textContent.startsWith('100 tokens in 2 chunks')")


@pytest.mark.slow
def test_what_the_server_refuses_is_said_in_its_words(opened):
    fill(opened, steps="2", width="64", sampler="plms", schedule="karras")
    opened.run("extras.nonsense = 1; refresh()")
    opened.click("#run")
    assert "nonsense" in opened.wait_for("byId('problem').textContent")
    assert opened.run("jobs.size") == 0
    opened.problems.clear()  # the browser's own line about status 400
    opened.click("#extras button")
    make(opened)
    assert "plms" in opened.run("byId('messages').querySelector('.warning').textContent")


@pytest.mark.slow
def test_explain_leads_to_the_page_of_a_picture(opened, url):
    make(opened, prompt="a red circle", steps="2")
    opened.click("#explain")
    link = opened.wait_for("byId('messages').querySelector('a')?.href")
    assert opened.run("document.activeElement.href") == link
    opened.open(link)
    assert opened.run("document.querySelector('h1').textContent") == "Watch Stable Diffusion make this picture"


@pytest.mark.slow
def test_screen_readers_learn_what_each_control_is(opened):
    make(opened, prompt="a red circle", steps="2")
    opened.run("document.querySelectorAll('details').forEach(box => { box.open = true })")
    opened.call("Accessibility.enable")
    nodes = opened.call("Accessibility.getFullAXTree")["nodes"]
    controls = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    active = {"button", "textbox", "spinbutton", "combobox", "slider", "radio", "link", "image"}
    assert [role for role, name in controls if role in active and not name.strip()] == []
    assert {("textbox", "Prompt"), ("spinbutton", "Steps"), ("combobox", "Sampler"), ("link", "Save")} <= set(controls)
    assert ("status", "") in controls or any(role == "status" for role, _ in controls)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_page_fits_the_window_with_everything_open(opened, url, tmp_path, width, scheme):
    make(opened, prompt="a word_that_is_very_long_" + "x" * 200, steps="2")
    arrive(opened, url, width=width, height=844, scheme=scheme)
    opened.wait_for(SHOWN)
    opened.click("#from")
    opened.wait_for("input")
    opened.click("[name=task][value=inpaint]")
    opened.run("document.querySelectorAll('details').forEach(box => { box.open = true })")
    assert opened.run("document.documentElement.scrollWidth") <= width
    dark = opened.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert dark == (scheme == "dark")


@pytest.mark.slow
def test_another_model_can_be_chosen_and_its_defaults_follow(browser, tiny_ckpt, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(tiny_ckpt, folder / "other.ckpt")
    with working(tiny_ckpt, tmp_path / "out", folder=folder) as worker, listening_server(worker) as port:
        arrive(browser, f"http://127.0.0.1:{port}/")
        assert browser.run("[...byId('models').options].map(option => option.value)") == ["tiny.ckpt", "other.ckpt"]
        browser.run("byId('models').value = 'other.ckpt'; byId('models').dispatchEvent(new Event('change'))")
        assert browser.run("[fields.steps.value, fields.sampler.value]") == ["", "auto"]
        make(browser, steps="2", **SMALL)
        assert worker.loaded.request.file.name == "other.ckpt"
        assert "other.ckpt" in browser.run("byId('messages').textContent")
        browser.wait_for("byId('models').value === 'other.ckpt' && fields.sampler.value === 'dpmpp_2m'")
        assert browser.run("[fields.steps.value, fields.guidance_scale.value]") == ["2", "7.5"]


@pytest.mark.slow
def test_a_server_with_a_token_lets_the_browser_in_by_the_address(browser, tiny_ckpt, tmp_path):
    with working(tiny_ckpt, tmp_path) as worker, listening_server(worker, Rules(token="a long token")) as port:
        arrive(browser, f"http://me:a%20long%20token@127.0.0.1:{port}/")
        make(browser, steps="2", **SMALL)


@pytest.mark.slow
def test_a_server_that_has_ended_is_said(browser, tiny_ckpt, tmp_path):
    with working(tiny_ckpt, tmp_path) as worker, listening_server(worker) as port:
        arrive(browser, f"http://127.0.0.1:{port}/")
    browser.click("#run")
    text = browser.wait_for("byId('problem').textContent")
    assert text == "The server does not answer. Is sd serve still running?"
