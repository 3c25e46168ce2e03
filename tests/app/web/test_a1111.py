"""The web UI's API, against a server with a narrow model."""

import base64
import io
import json
import shutil
import threading
from pathlib import Path

import pytest

pytest.importorskip("starlette")
from apis import as_text, decoded, halves, picture, served, white_left
from PIL import Image

from sd.app.web.a1111_lists import NOTHING, samplers, schedulers
from sd.pipeline.settings import Settings
from sd.sampling.names import SAMPLER_INFO, SCHEDULES

BODY = {"prompt": "a horse", "steps": 2, "width": 64, "height": 64, "seed": 7, "sampler_name": "Euler a"}


@pytest.fixture(scope="module")
def client(tiny_ckpt, tmp_path_factory):
    with served(tiny_ckpt, tmp_path_factory.mktemp("served")) as client:
        yield client


def post(client, path, body):
    return client.post(f"/sdapi/v1/{path}", json=body)


def test_txt2img_makes_the_pictures_and_says_how(client):
    answer = post(client, "txt2img", {**BODY, "batch_size": 2, "n_iter": 2, "foo": 1}).json()
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [7, 8, 9, 10]
    assert info["ignored"] == ["foo"]
    assert answer["parameters"] == {**BODY, "batch_size": 2, "n_iter": 2, "foo": 1}
    pictures = [decoded(image) for image in answer["images"]]
    assert [each.text["parameters"] for each in pictures] == info["infotexts"]
    assert [each.size for each in pictures] == [(64, 64)] * 4
    assert "Sampler: Euler a" in info["infotexts"][0]
    kept = client.app.state.worker.models.default.file
    assert info["sd_model_name"] == kept.stem


def test_the_bytes_are_those_of_the_file_and_of_the_command(client, call, tiny_ckpt):
    answer = post(client, "txt2img", BODY).json()
    job = client.app.state.worker.latest()[0]
    data = base64.b64decode(answer["images"][0])
    assert data == job.pictures[0].path.read_bytes()
    flags = ["--steps", "2", "-W", "64", "-H", "64", "--seed", "7", "--sampler", "Euler a", "-o", "a.png"]
    code, paths, errors = call("txt2img", "a horse", "-m", str(tiny_ckpt), *flags)
    assert code == 0, errors
    assert Path(paths.strip()).read_bytes() == data


def test_img2img_and_inpainting_keep_what_they_should(client):
    body = {**BODY, "init_images": [as_text(picture())], "denoising_strength": 0.6, "resize_mode": 1}
    whole = post(client, "img2img", body).json()
    info = json.loads(whole["info"])
    assert info["denoising_strength"] == 0.6
    assert "init_images" not in whole["parameters"]
    body |= {"mask": as_text(white_left()), "mask_blur": 0, "inpaint_full_res": False, "inpainting_fill": 0}
    answer = post(client, "img2img", body).json()
    (made, made_right), (before, before_right) = halves(decoded(answer["images"][0])), halves(picture())
    assert made_right == before_right
    assert made != before
    assert "Masked content: fill" in json.loads(answer["info"])["infotexts"][0]
    inverted = decoded(post(client, "img2img", {**body, "inpainting_mask_invert": 1}).json()["images"][0])
    assert halves(inverted)[0] == before


def test_enable_hr_makes_a_larger_picture(client):
    answer = post(client, "txt2img", {**BODY, "enable_hr": True, "hr_scale": 2, "denoising_strength": 0.5}).json()
    assert decoded(answer["images"][0]).size == (128, 128)
    assert "Hires upscale: 2" in json.loads(answer["info"])["infotexts"][0]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("txt2img", {**BODY, "restore_faces": True}, "restore_faces True cannot be used: networks that repair faces"),
        ("txt2img", {**BODY, "sampler_name": "Eulr"}, "sampler_name Eulr does not exist. Did you mean euler?"),
        ("txt2img", {**BODY, "cfg_scale": 5000}, "cfg_scale 5000 is out of range"),
        ("txt2img", {**BODY, "width": 8}, "width 8 is out of range"),
        ("txt2img", {**BODY, "override_settings": {"sd_vae": "../x"}}, "the VAE ../x does not exist. The folder"),
        ("txt2img", {**BODY, "override_settings": {"sd_model_checkpoint": "/etc/passwd"}}, "this server has one model"),
        ("txt2img", {**BODY, "refiner_checkpoint": "other"}, "this server has one model"),
        ("txt2img", {**BODY, "lora": [{"path": "/etc/passwd"}]}, ""),
        ("txt2img", {**BODY, "width": 2048, "height": 2048, "batch_size": 5}, "a batch of"),
        ("img2img", {**BODY, "init_images": ["../etc/passwd"]}, "init is not base64. No path is opened here"),
        ("img2img", {**BODY, "init_images": ["http://127.0.0.1/a.png"]}, "init is an address. Nothing is fetched"),
        ("img2img", {**BODY, "init_images": [base64.b64encode(b"<svg/>").decode()]}, "init is not a picture"),
        ("png-info", {"image": "!"}, "image is not base64."),
        ("png-info", {}, "image must be a picture in base64"),
        ("txt2img", [], "the body must be a JSON object"),
        ("options", {"CLIP_stop_at_last_layers": "two"}, "CLIP_stop_at_last_layers cannot be 'two'"),
        ("options", {"sd_model_checkpoint": "other"}, "this server has one model"),
        ("extra-single-image", {"image": as_text(picture()), "upscaler_1": "ESRGAN"}, "upscaler_1 ESRGAN does not"),
        ("extra-batch-images", {"imageList": ["AAAA"]}, "imageList must be a list of objects"),
    ],
)
def test_wrong_requests_get_a_sentence(client, path, body, message):
    answer = post(client, path, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"].startswith(message)
    assert answer.json()["detail"] == answer.json()["error"]
    assert "/tmp" not in answer.text


def test_options_hold_for_later_requests_whose_own_take_precedence(client):
    options = client.get("/sdapi/v1/options").json()
    assert options["sd_model_checkpoint"].startswith(client.app.state.worker.models.default.file.name)
    assert client.app.state.worker.models.find(options["sd_model_checkpoint"])
    assert post(client, "options", {"randn_source": "NV", "show_progress_type": "Full"}).json() == {
        "ignored": ["show_progress_type"]
    }
    try:
        assert client.get("/sdapi/v1/options").json()["randn_source"] == "NV"
        assert "RNG: NV" in json.loads(post(client, "txt2img", BODY).json()["info"])["infotexts"][0]
        own = {**BODY, "override_settings": {"randn_source": "CPU"}}
        assert "RNG" not in json.loads(post(client, "txt2img", own).json()["info"])["infotexts"][0]
    finally:
        post(client, "options", {"randn_source": "CPU"})


def test_progress_and_interrupt(client):
    idle = client.get("/sdapi/v1/progress").json()
    assert (idle["progress"], idle["state"]["job_count"], idle["current_image"]) == (0.0, 0, None)
    answers = []
    body = {**BODY, "steps": 900, "n_iter": 2}
    thread = threading.Thread(target=lambda: answers.append(post(client, "txt2img", body)))
    thread.start()
    seen = idle
    while not seen["current_image"]:
        seen = client.get("/sdapi/v1/progress").json()
    assert 0 < seen["progress"] < 0.5
    assert (seen["state"]["job"], seen["state"]["job_count"], seen["state"]["sampling_steps"]) == ("txt2img", 1, 900)
    assert Image.open(io.BytesIO(base64.b64decode(seen["current_image"]))).format == "JPEG"
    hidden = client.get("/sdapi/v1/progress?skip_current_image=true").json()
    assert hidden["current_image"] is None
    assert client.post("/sdapi/v1/interrupt").json() == {}
    thread.join()
    assert answers[0].json()["images"] == []
    assert json.loads(answers[0].json()["info"])["all_seeds"] == []


@pytest.mark.slow
def test_skip_goes_on_with_the_next_picture(client):
    answers = []
    body = {**BODY, "steps": 60, "n_iter": 2}
    thread = threading.Thread(target=lambda: answers.append(post(client, "txt2img", body)))
    thread.start()
    while client.get("/sdapi/v1/progress").json()["state"]["sampling_step"] < 2:
        continue
    assert client.post("/sdapi/v1/skip").json() == {}
    thread.join()
    assert json.loads(answers[0].json()["info"])["all_seeds"] == [8]


def test_png_info_reads_ours_and_others(client):
    made = post(client, "txt2img", BODY).json()
    found = post(client, "png-info", {"image": "data:image/png;base64," + made["images"][0]}).json()
    assert found["info"] == json.loads(made["info"])["infotexts"][0]
    assert found["items"].keys() == {"parameters", "sd"}
    assert found["parameters"].items() >= {"Prompt": "a horse", "Seed": "7", "Sampler": "Euler a"}.items()
    assert post(client, "png-info", {"image": as_text(picture())}).json() == {"info": "", "items": {}, "parameters": {}}


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"upscaler_1": "None"}, (64, 48)),
        ({"upscaler_1": "Lanczos"}, (128, 96)),
        ({"upscaler_1": "Nearest", "upscaling_resize": 1.5}, (96, 72)),
        ({"upscaler_1": "Lanczos", "resize_mode": 1, "upscaling_resize_w": 96, "upscaling_resize_h": 96}, (96, 96)),
        (
            {"upscaler_1": "Lanczos", "resize_mode": 1, "upscaling_resize_w": 96, "upscaling_crop": False}
            | {"upscaling_resize_h": 96},
            (96, 72),
        ),
    ],
)
def test_pictures_are_enlarged_by_a_filter(client, given, size):
    single = post(client, "extra-single-image", {"image": as_text(picture((64, 48))), **given}).json()
    assert decoded(single["image"]).size == size
    batch = post(
        client, "extra-batch-images", {"imageList": [{"data": as_text(picture((64, 48))), "name": ""}], **given}
    )
    assert batch.json()["images"] == [single["image"]]


def test_every_list_has_the_form_that_clients_read(client):
    def keys(name):
        return {frozenset(row) for row in client.get(f"/sdapi/v1/{name}").json()}

    assert keys("samplers") == {frozenset(("name", "aliases", "options"))}
    assert keys("schedulers") == {frozenset(("name", "label", "aliases", "default_rho", "need_inner_model"))}
    assert keys("sd-models") == {frozenset(("title", "model_name", "hash", "sha256", "filename", "config"))}
    assert keys("upscalers") == {frozenset(("name", "model_name", "model_path", "model_url", "scale"))}
    assert client.get("/sdapi/v1/latent-upscale-modes").json() == [{"name": "Latent"}]
    assert client.get("/sdapi/v1/embeddings").json() == {"loaded": {}, "skipped": {}}
    assert client.get("/sdapi/v1/memory").json().keys() == {"ram", "cuda"}
    assert client.get("/sdapi/v1/scripts").json() == {"txt2img": [], "img2img": []}
    assert all(client.get(f"/sdapi/v1/{name}").json() == [] for name in (*NOTHING, "sd-vae", "loras"))
    assert post(client, "refresh-checkpoints", {}).json() == {}
    for missing in ("/sdapi/v1/interrogate", "/controlnet/model_list"):  # clients ask so whether it is supported
        assert client.get(missing).status_code == 404


def test_files_of_the_users_folders_are_listed_by_name(client, tmp_path, monkeypatch):
    for kind in ("vae", "loras", "embeddings"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "nice.safetensors").write_bytes(bytes(8))
    monkeypatch.setenv("SD_MODELS", str(tmp_path))
    assert client.get("/sdapi/v1/sd-vae").json() == [{"model_name": "nice.safetensors", "filename": "nice.safetensors"}]
    assert client.get("/sdapi/v1/loras").json() == [
        {"name": "nice", "alias": "nice", "path": "nice.safetensors", "metadata": {}}
    ]
    assert client.get("/sdapi/v1/embeddings").json()["loaded"].keys() == {"nice"}


def test_each_listed_sampler_and_schedule_means_itself():
    def settings(**given):
        return Settings(prompt="", seed=0, width=64, height=64, steps=20, **given)

    for row, name in zip(samplers(), SAMPLER_INFO, strict=True):
        assert settings(sampler=row["name"]).sampler == name
    for row, name in zip(schedulers()[1:], SCHEDULES, strict=True):
        assert {settings(schedule=row[key]).schedule for key in ("name", "label")} == {name}


@pytest.mark.slow
def test_a_request_and_the_options_choose_among_the_models_of_a_folder(tiny_ckpt, tmp_path):
    other = tmp_path / "models" / "other.ckpt"
    other.parent.mkdir()
    shutil.copy(tiny_ckpt, other)
    with served(tiny_ckpt, tmp_path, folder=other.parent) as client:

        def used(**given):
            return json.loads(post(client, "txt2img", {**BODY, **given}).json()["info"])["sd_model_name"]

        titles = {row["model_name"]: row["title"] for row in client.get("/sdapi/v1/sd-models").json()}
        assert titles.keys() == {"tiny", "other"}
        assert used() == "tiny"
        assert used(override_settings={"sd_model_checkpoint": titles["other"]}) == "other"
        assert post(client, "options", {"sd_model_checkpoint": "other.ckpt"}).json() == {}
        assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"].startswith("other.ckpt")
        assert used() == "other"
        assert used(model="tiny") == "tiny"
        wrong = post(client, "options", {"sd_model_checkpoint": "third"}).json()["error"]
        assert wrong == "the model third does not exist. There are: tiny.ckpt or other.ckpt."
