"""OpenAI's images API, against a server with a narrow model."""

import base64
import json
import threading
import time

import pytest

pytest.importorskip("starlette")
from apis import as_bytes, decoded, halves, hole, picture, served, white_left
from PIL import Image
from served import client as of

from sd.app.web.guard import Rules

BODY = {"prompt": "a horse", "steps": 4, "size": "64x64", "seed": 7}


@pytest.fixture(scope="module")
def client(tiny_ckpt, tmp_path_factory):
    rules = Rules(origins=frozenset({"https://chat.example"}))
    with served(tiny_ckpt, tmp_path_factory.mktemp("served"), rules=rules) as client:
        yield client


def generate(client, **given):
    return client.post("/v1/images/generations", json={**BODY, **given})


def edit(client, path="edits", files=(), **given):
    return client.post(f"/v1/images/{path}", data={**BODY, **given}, files=list(files))


def image_file(image, name="image", kind="PNG"):
    return (name, ("a.png", as_bytes(image, kind), f"image/{kind.lower()}"))


def events_in(answer):
    """The name and data of each event in a stream, and how it ends."""
    blocks = [block for block in answer.text.split("\n\n") if block and not block.startswith(":")]
    assert blocks.pop() == "data: [DONE]"
    rows = [block.split("\n") for block in blocks]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in rows]


def test_generations_come_as_bytes_and_by_address(client):
    answer = generate(client, n=2, model="gpt-image-1", user="me").json()
    first, second = answer["data"]
    assert (first["seed"], second["seed"]) == (7, 8)
    assert (answer["size"], answer["output_format"], answer["ignored"]) == ("64x64", "png", ["user"])
    assert decoded(first["b64_json"]).text["parameters"] == first["infotext"]
    assert client.get(first["url"]).content == base64.b64decode(first["b64_json"])
    assert generate(client, response_format="url").json()["data"][0].keys() == {"seed", "settings", "infotext", "url"}


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats(client, kind):
    row = generate(client, output_format=kind, output_compression=90).json()["data"][0]
    assert decoded(row["b64_json"]).format == kind.upper()
    found = client.get(row["url"])
    assert found.headers["content-type"] == f"image/{kind}"
    assert client.get(row["url"].replace(f".{kind}", ".gif")).status_code == 404


def test_fields_beyond_theirs(client):
    given = {"negative_prompt": "blurry", "guidance_scale": 3, "sampler": "DDIM", "quality": "low"}
    settings = generate(client, **given).json()["data"][0]["settings"]
    assert settings.items() >= {"negative_prompt": "blurry", "guidance_scale": 3, "sampler": "ddim", "steps": 4}.items()
    body = {name: BODY[name] for name in ("prompt", "size", "seed")}
    answer = client.post("/v1/images/generations", json={**body, "quality": "low"}).json()
    assert answer["data"][0]["settings"]["steps"] == 15


@pytest.mark.slow
def test_a_stream_has_previews_and_the_picture(client):
    events = events_in(generate(client, stream=True, partial_images=2, steps=20))
    names = [name for name, _ in events]
    assert names[0] == "image_generation.partial_image"
    assert names[-1] == "image_generation.completed"
    assert [data["type"] for _, data in events] == names
    assert [data["partial_image_index"] for _, data in events[:-1]] == list(range(len(events) - 1))
    assert decoded(events[0][1]["b64_json"]).size == (64, 64)
    plain = generate(client, steps=20).json()["data"][0]
    assert events[-1][1]["b64_json"] == plain["b64_json"]
    assert [name for name, _ in events_in(generate(client, stream=True, n=2))] == ["image_generation.completed"] * 2


def with_hole(image):
    return Image.merge("RGBA", (*image.split(), hole(image.size).getchannel("A")))


@pytest.mark.parametrize(
    "files",
    [
        (image_file(picture()), image_file(hole(), "mask")),
        (image_file(picture(), "image[]"), image_file(white_left(), "mask")),
        (image_file(with_hole(picture())),),
    ],
    ids=["transparent", "white", "own hole"],
)
def test_an_edit_repaints_what_is_transparent(client, files):
    row = edit(client, files=files, mask_blur="0").json()["data"][0]
    (made, made_right), (before, before_right) = halves(decoded(row["b64_json"])), halves(picture())
    assert made_right == before_right
    assert made != before
    assert row["settings"]["task"] == "inpaint"


def test_an_edit_without_a_mask_changes_all_of_the_picture(client):
    files = [image_file(picture(), kind="JPEG")]
    row = edit(client, files=files, strength="0.5").json()["data"][0]
    assert row["settings"].items() >= {"task": "img2img", "strength": 0.5}.items()
    assert edit(client, files=files, input_fidelity="high").json()["data"][0]["settings"]["strength"] == 0.5
    names = [name for name, _ in events_in(edit(client, files=files, stream="true", partial_images="1"))]
    assert names[-1] == "image_edit.completed"


def test_a_variation_has_the_prompt_of_its_picture(client):
    made = generate(client, prompt="a red horse").json()["data"][0]
    files = [("image", ("a.png", base64.b64decode(made["b64_json"]), "image/png"))]
    answer = client.post("/v1/images/variations", data={"n": "2", "steps": "2", "size": "64x64"}, files=files).json()
    assert [row["settings"]["prompt"] for row in answer["data"]] == ["a red horse"] * 2
    assert answer["size"] == "64x64"
    empty = client.post(
        "/v1/images/variations", data={"steps": "2", "size": "64x64"}, files=[image_file(picture())]
    ).json()
    assert empty["data"][0]["settings"]["prompt"] == ""


PICTURE = image_file(picture())


@pytest.mark.parametrize(
    ("send", "status", "param", "message"),
    [
        (lambda c: generate(c, size="70x64"), 400, "size", "size: width 70 is not a multiple of 8."),
        (lambda c: generate(c, steps=0), 400, "steps", "steps 0 is out of range: 1 to 1000."),
        (lambda c: generate(c, sampler="Eulr"), 400, "sampler", "sampler Eulr does not exist."),
        (lambda c: generate(c, background="transparent"), 400, "background", "background transparent cannot be used"),
        (lambda c: generate(c, model="other"), 404, "model", "this server has one model"),
        (lambda c: generate(c, foo=1), 400, "'foo'", "'foo' does not exist."),
        (lambda c: c.post("/v1/images/generations", json={}), 400, "prompt", "prompt is missing"),
        (lambda c: c.post("/v1/images/generations", json=[]), 400, None, "the body must be a JSON object"),
        (lambda c: c.post("/v1/images/edits", json={}), 415, None, "pictures come as a form"),
        (lambda c: edit(c), 415, None, "pictures come as a form"),
        (
            lambda c: edit(c, files=[image_file(white_left(), "mask")]),
            400,
            "image",
            "image must be one picture, got 0.",
        ),
        (lambda c: edit(c, files=[PICTURE, PICTURE]), 400, "image", "image must be one picture, got 2."),
        (lambda c: edit(c, files=[PICTURE, image_file(picture(), "markup")]), 400, "markup", "markup cannot be used"),
        (lambda c: edit(c, files=[("image", ("a.png", b"<svg/>", "image/png"))]), 400, "image", "image is not a pict"),
        (lambda c: c.get("/v1/models/other"), 404, None, "there is no such model. There are: tiny.ckpt."),
        (lambda c: c.get("/v1/nothing"), 404, None, "there is nothing at this address."),
        (lambda c: c.get("/v1/models", headers={"Origin": "https://evil.example"}), 403, None, "pages of other sites"),
    ],
)
def test_errors_have_their_form(client, send, status, param, message):
    answer = send(client)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"].startswith(message)
    assert error["param"] == param
    assert error["type"].endswith("_error")
    assert "/tmp" not in answer.text


def test_models_are_listed(client):
    rows = client.get("/v1/models").json()
    assert rows["object"] == "list"
    assert [row["id"] for row in rows["data"]] == ["tiny.ckpt"]
    assert client.get("/v1/models/tiny.ckpt").json() == rows["data"][0]
    assert generate(client, model="tiny").status_code == 200


def test_who_may_ask_from_a_browser(client):
    path, asked = "/v1/images/generations", {"Access-Control-Request-Method": "POST"}
    assert client.options(path).status_code == 204  # as one client asks whether the server is there
    allowed = client.options(path, headers={"Origin": "https://chat.example", **asked})
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    form = client.post("/v1/images/edits", files=[PICTURE], headers={"Origin": "https://evil.example"})
    assert form.status_code == 403
    other = client.options(path, headers={"Origin": "https://evil.example", **asked})
    assert other.status_code == 403
    assert "access-control-allow-origin" not in other.headers


def test_a_token_is_the_key(client):
    guarded = of(client.app.state.worker, Rules(token="a long secret"))
    missing = guarded.get("/v1/models")
    assert (missing.status_code, missing.json()["error"]["type"]) == (401, "authentication_error")
    assert guarded.get("/v1/models", headers={"Authorization": "Bearer a long secret"}).status_code == 200


def test_a_full_queue_and_a_stopped_job_are_said_in_their_form(client, monkeypatch):
    worker = client.app.state.worker
    monkeypatch.setattr(worker, "most_waiting", 0)
    busy = generate(client)
    assert (busy.status_code, busy.json()["error"]["type"], busy.headers["retry-after"]) == (503, "server_error", "5")
    monkeypatch.undo()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(generate(client, steps=900)))
    thread.start()
    while worker.current is None:
        time.sleep(0.01)
    client.post("/sdapi/v1/interrupt")
    thread.join()
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["message"].startswith("the job was stopped before its first picture")
