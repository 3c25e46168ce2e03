"""The live model in real browsers: its pictures are Python's, and it asks nobody else for anything."""

import base64
import json
import os
import socket
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch
from firefox import Firefox, find_firefox
from PIL import Image, ImageDraw

import sd
from convert.published.connection import DownloadError
from sd.app.jobs.extras import missing_packages
from sd.app.jobs.playing import write_folder
from sd.app.jobs.request import Events
from sd.app.jobs.static_server import FolderServer, Handler
from sd.pipeline.image.masks import composite
from sd.pipeline.image.tensors import init_image_from
from sd.sampling.schedule import alphas_cumprod
from sd.study.explain.attention import AttentionWatch

pytestmark = pytest.mark.slow

PROMPT = "a (large:1.2) white star to the left of a black ring on a green background"
NEAR = 2  # of 255
START = """(async () => {
    const {connect} = await import('/client.js');
    const text = values => btoa(Array.from(values, value => String.fromCharCode(value)).join(''));
    const bytes = text => Uint8ClampedArray.from(atob(text), letter => letter.charCodeAt(0));
    const engine = await connect();
    const records = [];
    const draw = async (request, picture, mask) => {
        if (picture) request.init = {picture: {width: 128, height: 128, data: bytes(picture)}};
        if (mask) request.mask = bytes(mask);
        records.length = 0;
        const {picture: made} = await engine.start(request, {step(record) { records.push(record); }}).finished;
        return text(made.data);
    };
    Object.assign(window, {engine, draw, records});
    return JSON.stringify({threads: engine.model.threads, own: crossOriginIsolated});
})()"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder with the real networks and the real runtime."""
    if missing := missing_packages("onnx"):
        pytest.skip(f"needs {', '.join(missing)}, to export the networks")
    folder = tmp_path_factory.mktemp("play") / "play"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", os.environ.get("PLAY_CACHE") or str(tmp_path_factory.getbasetemp() / "cache"))
        try:
            write_folder(folder, Events())
        except DownloadError as problem:
            pytest.skip(f"needs the runtime for browsers, from npm's registry: {problem}")
    return folder


@pytest.fixture(scope="module")
def asked():
    return []


def serving(folder, handler):
    sock = socket.create_server(("127.0.0.1", 0))
    server = FolderServer(folder, sock)
    server.RequestHandlerClass = partial(handler, directory=str(folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture(scope="module")
def address(folder, asked):
    class Watched(Handler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

    (folder / "empty.html").write_text("<!doctype html><link rel=icon href=data:,><title>empty</title>")
    server, address = serving(folder, Watched)
    yield address
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def page(browser, address):
    """Chromium with the engine loaded, as `engine`; `draw` makes a picture."""
    browser.open(f"{address}/empty.html")
    assert json.loads(browser.run(START))["own"]
    return browser


@pytest.fixture(scope="module")
def model():
    return sd.load(precision="fp32")


def drawn(page, picture=None, mask=None, **request):
    given = [None if each is None else base64.b64encode(each.tobytes()).decode() for each in (picture, mask)]
    data = page.run(f"draw({json.dumps(request)}, {json.dumps(given[0])}, {json.dumps(given[1])})")
    return Image.frombytes("RGBA", (128, 128), base64.b64decode(data)).convert("RGB")


def furthest(one, other):
    return np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max()


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_a_picture_is_pythons_for_the_same_settings(page, model, sampler):
    common = {"seed": 42, "steps": 10, "sampler": sampler}
    ours = drawn(page, prompt=PROMPT, negative="blurry", guidance=5, **common)
    (theirs,) = model.txt2img(PROMPT, negative_prompt="blurry", guidance_scale=5, **common)
    assert furthest(ours, theirs) <= NEAR
    assert (
        furthest(drawn(page, prompt="a yellow heart", guidance=1, **common), theirs) > 50
    )  # another picture is another


def test_a_picture_from_a_picture_is_pythons_and_what_a_mask_keeps_stays_exactly(page, model):
    (before,) = model.txt2img("a red circle on a blue background", seed=3, steps=10)
    common = {"prompt": "a blue star on a yellow background", "seed": 5, "steps": 10}
    ours = drawn(page, before.convert("RGBA"), strength=0.7, **common)
    assert furthest(ours, model.img2img(common["prompt"], before, strength=0.7, seed=5, steps=10)[0]) <= NEAR
    mask = Image.new("L", (128, 128))
    ImageDraw.Draw(mask).ellipse([30, 40, 90, 100], fill=255)
    ours = drawn(page, before.convert("RGBA"), mask, strength=0.8, **common)
    settings = model.settings_for(strength=0.8, **common)
    theirs = composite(before, model.make([settings], init_image_from(before, mask))[0], mask)
    assert furthest(ours, theirs) <= NEAR
    kept = np.asarray(mask) == 0
    assert (np.asarray(ours)[kept] == np.asarray(before)[kept]).all()


def test_each_word_has_the_map_of_sd_explain(page, model):
    prompt = "a red circle"
    drawn(page, prompt=prompt, seed=1, steps=4, guidance=1)
    record = json.loads(
        page.run(
            "JSON.stringify({...records[2], attention: [...records[2].attention.maps], x: [...records[2].latents]})"
        )
    )
    x_t = torch.tensor(record["x"]).reshape(1, 4, 16, 16)
    columns = [3, 0, 1, 2, *[3] * 73]  # start, three words, end and padding
    with AttentionWatch(model.unet, heads_apart=False).watching() as watch:
        watch.expect(columns)
        model.unet(x_t, torch.tensor(record["timestep"]), model.encode_prompts([prompt]))
        largest, *_ = watch.take()
    assert (largest.height, largest.layers) == (16, 5)
    found = torch.tensor(record["attention"]).reshape(4, 16, 16)
    torch.testing.assert_close(found, largest.weights[0], rtol=1e-3, atol=1e-5)
    alpha_bar = alphas_cumprod(model.config.schedule)
    assert alpha_bar[-1] < record["alphaBar"] < alpha_bar[0]


def test_a_run_pauses_takes_painted_latents_goes_on_and_stops(page):
    seen = json.loads(
        page.run("""(async () => {
        const seen = [], all = [], request = {prompt: 'a red circle', seed: 5, steps: 6, sampler: 'dpmpp_2m'};
        await draw(request);
        const before = records.map(record => record.next);
        const run = engine.start({...request, pauseAt: 3}, {
            paused({step, latents}) {
                seen.push(['paused', step]);
                run.resume({latents: latents.map(value => -value)});
            },
            step(record) { all.push(record); },
        });
        const result = await run.finished;
        const same = all.map(({next}, i) => next.every((value, j) => value === before[i][j]));
        const again = engine.start({...request, pauseAt: 0}, {paused() { again.stop(); }});
        const {stopped, picture, steps} = await again.finished;
        return JSON.stringify({seen, same, steps: result.steps, after: [stopped, picture, steps]});
    })()""")
    )
    assert seen == {
        "seen": [["paused", 3]],
        "same": [True, True, True, False, False, False],
        "steps": 6,
        "after": [True, None, 0],
    }


def test_a_network_is_its_weights_in_two_bytes_each_and_little_else(folder, model):
    weights = sum(parameter.numel() for parameter in model.unet.parameters())
    data = (folder / "unet.onnx").read_bytes()
    assert len(data) < 2.2 * weights
    assert os.fsencode(Path(sd.__file__).parent) not in data  # as the exporter notes of every operation


def test_mistakes_are_sentences(page):
    said = page.run("engine.tokens('(a:99)').catch(error => error.message)")
    assert said.startswith("“a” has the weight 99; weights are −10 to 10.")
    wrong = "{prompt: 'a', seed: 1, steps: 4, sampler: 'heun'}"
    assert "ddim" in page.run(f"engine.start({wrong}).finished.catch(error => error.message)")


def test_memory_does_not_grow_over_fifty_pictures(page):
    def resident():
        """Bytes of the browser and all its processes."""
        sizes, families = {}, {page._process.pid}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    status = dict(
                        line.split(":\t", 1) for line in Path(f"/proc/{entry}/status").read_text().splitlines()
                    )
                except OSError:
                    continue
                sizes[int(entry)] = int(status["PPid"]), 1024 * int(status.get("VmRSS", "0 kB").split()[0])
        while more := {pid for pid, (parent, _) in sizes.items() if parent in families} - families:
            families |= more
        return sum(size for pid, (_, size) in sizes.items() if pid in families)

    def pictures(count):
        for seed in range(count):
            drawn(page, prompt=f"a red circle {seed}", seed=seed, steps=2)

    pictures(10)
    before = resident()
    pictures(50)
    assert resident() < 1.1 * before + 20e6


def test_nothing_is_asked_of_anybody_else(page, address, asked):
    assert {request for request in page.requests if not request.startswith((address, "data:"))} == set()
    assert [
        problem for problem in page.problems if "Content Security Policy" in problem or "exception" in problem
    ] == []
    names = {path.rpartition("/")[2] for path in asked}
    assert {"unet.onnx", "ort-wasm-simd-threaded.wasm", "model.json", "worker.js"} <= names


def test_without_the_headers_for_threads_it_computes_in_one(folder, browser, model):
    server, address = serving(folder, SimpleHTTPRequestHandler)
    try:
        browser.open(f"{address}/empty.html")
        assert json.loads(browser.run(START)) == {"threads": 1, "own": False}
        ours = drawn(browser, prompt="a yellow heart", seed=1, steps=4)
        assert furthest(ours, model.txt2img("a yellow heart", seed=1, steps=4)[0]) <= NEAR
    finally:
        server.shutdown()
        server.server_close()


def test_opened_as_a_file_the_page_says_what_to_do(folder, browser):
    browser.open(folder / "index.html")
    assert "Run “sd play”" in browser.run("document.getElementById('loading').textContent")


def test_firefox_draws_the_same_picture(address, model, tmp_path):
    executable = find_firefox()
    if executable is None:
        pytest.skip("no Firefox here")
    firefox = Firefox(executable, tmp_path)
    try:
        firefox.open(f"{address}/empty.html")
        assert json.loads(firefox.run(START))["own"]
        ours = drawn(firefox, prompt=PROMPT, seed=42, steps=10)
    finally:
        firefox.close()
    assert furthest(ours, model.txt2img(PROMPT, seed=42, steps=10)[0]) <= NEAR
