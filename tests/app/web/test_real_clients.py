"""Programs that speak the two APIs, as they are published, against a live server with a narrow model."""

import base64
import json
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import venv
from pathlib import Path

import pytest

pytest.importorskip("starlette")

from apis import as_bytes, decoded, halves, hole, picture, white_left
from served import listening_server, working

ROOT = Path(__file__).parents[3]
CHECKS = ROOT / "scripts" / "checks"
MODEL = "narrow-flux-schnell.ckpt"  # the MCP client tells by the name that it is quick: 4 steps without guidance
MCP, SILLY_TAVERN = "image-generation-mcp==1.12.1", "sillytavern@1.19.0"
SIZE = {"width": 64, "height": 64}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tiny_ckpt, tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    shutil.copy(tiny_ckpt, folder / MODEL)
    quick = {"tiny_vae": ROOT / "weights" / "tiny-vae.safetensors"}  # the MCP client waits for 180 seconds only
    with working(folder / MODEL, f"{folder}/out/", **quick) as worker, listening_server(worker) as port:
        yield f"http://127.0.0.1:{port}"


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return answer.read().decode()


# OpenAI's


@pytest.fixture
def images(address):
    from openai import OpenAI

    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client.images


def file(image, name="a.png"):
    return (name, as_bytes(image), "image/png")


def test_openai_generates_with_its_fields_and_ours(images):
    ours = {"steps": 4, "seed": 5, "negative_prompt": "blurry", "guidance_scale": 3, "sampler": "Euler a"}
    answer = images.generate(model="gpt-image-1", prompt="a horse", n=2, size="64x64", extra_body=ours)
    assert [row.seed for row in answer.data] == [5, 6]
    assert decoded(answer.data[0].b64_json).size == (64, 64)
    with urllib.request.urlopen(answer.data[1].url) as reply:
        assert reply.read() == base64.b64decode(answer.data[1].b64_json)


def test_openai_edits_by_mask_and_varies(images):
    given = {"prompt": "a cow", "size": "64x64", "extra_body": {"steps": 4, "mask_blur": 0}}
    edited = images.edit(image=file(picture()), mask=file(hole()), **given)
    (left, right), (left_before, right_before) = halves(decoded(edited.data[0].b64_json)), halves(picture())
    assert right == right_before
    assert left != left_before
    whole = images.edit(image=[file(picture())], **{**given, "extra_body": {"steps": 4, "strength": 0.5}})
    assert whole.data[0].settings["task"] == "img2img"
    with pytest.warns(DeprecationWarning, match="deprecated"):
        varied = images.create_variation(image=file(picture()), n=2, size="64x64", extra_body={"steps": 4})
    assert len({row.b64_json for row in varied.data}) == 2


@pytest.mark.parametrize("kind", ["image_generation", "image_edit"])
def test_openai_streams_previews_and_the_picture(images, kind):
    given = {"prompt": "a cow", "size": "64x64", "stream": True, "partial_images": 2, "extra_body": {"steps": 40}}
    if kind == "image_edit":
        events = list(images.edit(image=file(picture()), **given))
    else:
        events = list(images.generate(**given))
    assert events[0].type == f"{kind}.partial_image"
    assert events[-1].type == f"{kind}.completed"
    assert {decoded(event.b64_json).size for event in events} == {(64, 64)}
    assert [event.partial_image_index for event in events[:-1]] == list(range(len(events) - 1))


def test_openai_knows_the_models_and_reads_errors(images):
    import openai

    assert [model.id for model in images._client.models.list()] == [MODEL]
    assert images._client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.BadRequestError, match=r"'72\.5x64' is not a size") as caught:
        images.generate(prompt="a horse", size="72.5x64")
    assert caught.value.param == "size"
    with pytest.raises(openai.NotFoundError, match="this server has one model"):
        images.generate(prompt="a horse", model="other")


# The web UI's


def test_webuiapi(address):
    from webuiapi import WebUIApi

    api = WebUIApi(baseurl=f"{address}/sdapi/v1")
    made = api.txt2img(prompt="a horse", steps=4, seed=3, batch_size=2, **SIZE)
    assert made.info["all_seeds"] == [3, 4]
    assert [image.text["parameters"] for image in made.images] == made.info["infotexts"]
    assert api.png_info(made.image).info == made.info["infotexts"][0]
    changed = api.img2img(images=[picture()], prompt="a cow", steps=4, denoising_strength=0.6, **SIZE)
    assert changed.info["denoising_strength"] == 0.6
    only = {"inpaint_full_res": False, "mask_blur": 0, "steps": 4, **SIZE}
    inpainted = api.img2img(images=[picture()], mask_image=white_left().convert("RGB"), prompt="a cow", **only)
    assert halves(inpainted.image)[1] == halves(picture())[1]
    api.util_set_model("narrow")
    api.util_wait_for_ready(0.1)
    assert api.util_get_current_model() in api.util_get_model_names()
    assert {"Euler a", "DPM++ 2M"} <= set(api.util_get_sampler_names())
    assert "karras" in api.util_get_scheduler_names()
    assert api.extra_single_image(picture(), upscaler_1="Lanczos", upscaling_resize=2).image.size == (128, 128)
    of = "options cmd_flags progress sd_vae upscalers latent_upscale_modes loras hypernetworks face_restorers"
    for name in (*of.split(), "realesrgan_models", "prompt_styles", "scripts", "embeddings", "memory"):
        assert getattr(api, f"get_{name}")() is not None
    assert api.refresh_checkpoints() == api.interrupt() == api.skip() == {}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the client needs Python 3.11")
def test_sd_backend_client(address):
    from sd_backend_client.api.detect import connect_to_backend
    from sd_backend_client.api.shared_data.diffusion_params import DiffusionParams
    from sd_backend_client.errors import SDBackendError

    api = connect_to_backend(address)
    small = {"prompt": "a horse", "steps": 4, **SIZE}
    made = api.submit_txt2img(DiffusionParams(seed=9, batch_size=2, **small)).wait(timeout=300)
    assert made.seeds == [9, 10]
    inputs = {"init_images": [picture()], **small}
    assert api.submit_img2img(DiffusionParams(**inputs)).wait(timeout=300).images[0].size == (64, 64)
    inpainted = api.submit_inpaint(DiffusionParams(mask=white_left(), mask_blur=0, **inputs)).wait(timeout=300)
    assert halves(inpainted.images[0])[1] == halves(picture())[1]
    assert api.submit_upscale(picture(), 128, 96).wait(timeout=300).images[0].size == (128, 96)
    able = api.get_capabilities()
    assert [able.scheduler, able.controlnet, able.interrogate, able.soft_inpainting] == [True, False, False, False]
    assert [row.name for row in api.list_checkpoints()] == [MODEL]
    lists = "vaes loras hypernetworks controlnet_models samplers schedulers upscalers"
    assert all(isinstance(getattr(api, f"list_{name}")(), list) for name in lists.split())
    long = api.submit_txt2img(DiffusionParams(**{**small, "steps": 900}))
    while long.poll().preview is None:
        continue
    assert long.cancel()
    with pytest.raises(SDBackendError, match="cancelled"):
        long.wait(timeout=300)
    api.set_config({"sd_model_checkpoint": MODEL})


def test_sillytaverns_routes(address, tmp_path):
    if not shutil.which("npm"):
        pytest.skip("there is no npm")
    folder = silly_tavern(tmp_path)
    with subprocess.Popen(["node", "sillytavern.mjs"], cwd=folder, stdout=subprocess.PIPE, text=True) as node:
        try:
            route = f"http://127.0.0.1:{int(node.stdout.readline())}/api/sd"
            who = {"url": address, "auth": ""}
            assert post(f"{route}/ping", who) == post(f"{route}/sdcpp/ping", who) == "OK"
            assert "DPM++ 2M" in json.loads(post(f"{route}/samplers", who))
            assert "karras" in json.loads(post(f"{route}/schedulers", who))
            assert json.loads(post(f"{route}/upscalers", who)) == ["None", "Latent", "Lanczos", "Nearest"]
            assert json.loads(post(f"{route}/vaes", who)) == []
            (model,) = json.loads(post(f"{route}/models", who))
            assert post(f"{route}/set-model", {**who, "model": model["value"]}) == "OK"
            assert post(f"{route}/get-model", who) == model["value"]
            chosen = {"prompt": "a horse", "steps": 4, "cfg_scale": 7, **SIZE}
            theirs = {"sampler_name": "DPM++ 2M", "scheduler": "Karras", "hr_additional_modules": [], "seed": 4}
            theirs |= {"override_settings": {"CLIP_stop_at_last_layers": 2}, "restore_faces": False, "enable_hr": False}
            answer = json.loads(post(f"{route}/generate", {**who, **chosen, **theirs}))
            assert "Clip skip: 2" in decoded(answer["images"][0]).text["parameters"]
            (listed,) = json.loads(post(f"{route}/sdcpp/models", who))["data"]
            cpp = {"model": listed["id"], "sampler_name": "dpm++2m", "scheduler": "discrete", "batch_size": 1}
            answer = json.loads(post(f"{route}/sdcpp/generate", {**who, **chosen, **cpp}))
            assert "Schedule type: Normal" in decoded(answer["images"][0]).text["parameters"]
        finally:
            node.kill()


def silly_tavern(folder):
    """Its package, unpacked; beside it, what its routes for pictures import."""

    def npm(*words):
        subprocess.run(["npm", *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)

    npm("pack", SILLY_TAVERN)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    package = folder / "package"
    wanted = json.loads((package / "package.json").read_text())["dependencies"]
    todo, seen, names = [package / "src" / "endpoints" / "stable-diffusion.js"], set(), set()
    while todo:
        path = todo.pop().resolve()
        if path not in seen:
            seen.add(path)
            for name in re.findall(r"^import[^'\"]*['\"]([^'\"]+)['\"]", path.read_text(), re.MULTILINE):
                if name.startswith("."):
                    todo.append(path.parent / name)
                else:
                    names.add(name)
    (folder / "package.json").write_text("{}")
    packages = [f"{name}@{wanted[name]}" for name in names & wanted.keys()]
    npm("install", "--ignore-scripts", "--no-audit", "--no-fund", *packages)
    shutil.copy(CHECKS / "sillytavern.mjs", package)
    return package


def test_an_mcp_server_makes_a_picture(address, tmp_path):
    post(f"{address}/sdapi/v1/options", {"token_merging_ratio": 0.75})  # it asks for 1024x1024 pixels
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", MCP], check=True)
    command = [python, CHECKS / "mcp_client.py", address, tmp_path / "made"]
    said = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=tmp_path).stdout)
    assert said["status"] == "completed", said
    assert said["model"].startswith(MODEL)
    assert any((tmp_path / "made").rglob("*.png"))
