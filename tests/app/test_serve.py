"""The server's own API: jobs in, events and pictures out, and the same pictures as from the command line."""

import base64
import io
import threading

import pytest
from PIL import Image
from served import QUICK, client, events_of, over, submitted, told_by, working

pytest.importorskip("starlette")


@pytest.fixture(scope="module")
def worker(tiny_ckpt, tmp_path_factory):
    with working(tiny_ckpt, tmp_path_factory.mktemp("served") / "out") as worker:
        yield worker


@pytest.fixture(scope="module")
def http(worker):
    with client(worker) as http:
        yield http


@pytest.fixture(scope="module")
def picture():
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_a_picture_has_the_bytes_of_the_command_in_memory_and_on_disk(http, worker, run, tiny_ckpt):
    job = over(http, submitted(http, prompt="a (red:1.2) cat", count=2))
    assert (job["state"], job["error"], job["step"], job["steps"]) == ("done", None, 4, 4)
    small = ["-W", 64, "-H", 64, "--steps", 2, "-s", 7, "--precision", "fp32", "-m", tiny_ckpt]
    _, paths, _ = run("txt2img", "a (red:1.2) cat", *small, "--count", 2)
    for mine, path in zip(job["pictures"], paths, strict=True):
        with open(path, "rb") as file:
            expected = file.read()
        answer = http.get(mine["url"])
        assert answer.content == expected
        assert answer.headers["cache-control"].startswith("private")
        assert (
            next(p for p in worker.find(job["id"]).pictures if p.sha256 == mine["sha256"]).path.read_bytes() == expected
        )


def test_the_settings_of_a_picture_are_a_job_that_makes_it_again(http):
    first = over(http, submitted(http, sampler="Euler a", guidance_scale=3, negative_prompt="x"))["pictures"][0]
    assert first["infotext"].splitlines()[1:2] == ["Negative prompt: x"]
    again = over(http, submitted(http, **{**first["settings"], "prompt": first["settings"]["prompt"]}))
    assert again["pictures"][0]["sha256"] == first["sha256"]


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("img2img", {"strength": 0.5}),
        ("inpaint", {"mask": True}),
        ("inpaint", {"expand": "left=64", "width": 128, "height": 64}),
    ],
)
def test_a_picture_can_come_with_the_job(http, picture, task, fields):
    given = {name: picture if value is True else value for name, value in fields.items()}
    job = over(http, submitted(http, task=task, init=f"data:image/png;base64,{picture}", **given))
    assert (job["state"], job["task"]) == ("done", task), job
    assert job["pictures"][0]["settings"]["task"] == task


def test_events_tell_steps_with_previews_pictures_and_the_end_and_go_on_after_a_number(http):
    id = submitted(http, count=2, steps=20)
    found = events_of(http, id)
    names = [name for _, name, _ in found]
    assert (names[0], names[-1]) == ("state", "done")
    assert names.count("picture") == 2
    steps = [data for _, name, data in found if name == "step"]
    assert {step["steps"] for step in steps} == {40}
    assert all(step["preview"].startswith("data:image/jpeg;base64,") for step in steps)
    numbers = [number for number, _, _ in found if number]
    assert numbers == sorted(set(numbers))
    again = events_of(http, id, **{"Last-Event-ID": str(numbers[-2])})
    assert [name for _, name, _ in again] == ["done"]


@pytest.mark.slow
def test_jobs_are_made_in_their_order_and_a_waiting_one_knows_its_position(http, worker):
    slow = submitted(http, steps=60, previews=False)
    ids = [submitted(http, seed=seed) for seed in range(3)]
    waiting = [http.get(f"/api/jobs/{id}").json()["position"] for id in ids]
    assert waiting == sorted(waiting)
    assert [over(http, id)["pictures"][0]["seed"] for id in ids] == [0, 1, 2]
    assert over(http, slow)["state"] == "done"
    paths = [int(job.pictures[0].path.name[:5]) for job in reversed(worker.latest()) if job.id in ids]
    assert paths == sorted(paths)


def test_stop_ends_a_job_within_one_step_and_keeps_finished_pictures(http, worker):
    id = submitted(http, count=3, steps=30)
    job = worker.find(id)
    for event in told_by(job):
        if event.name == "picture":
            break
    next(event for event in told_by(job, after=event.id) if event.name == "step")
    job.stop()
    at = job.step
    ended = over(http, id)
    assert ended["state"] == "stopped"
    assert ended["step"] <= at + 1
    assert len(ended["pictures"]) == 1
    assert over(http, submitted(http))["state"] == "done"


def test_a_job_that_waits_is_stopped_at_once(http):
    slow, waiting = submitted(http, steps=500), submitted(http)
    assert http.post(f"/api/jobs/{waiting}/stop").json()["state"] == "stopped"
    http.post(f"/api/jobs/{slow}/stop")
    assert over(http, slow)["state"] == "stopped"
    assert http.get(f"/api/jobs/{waiting}").json()["pictures"] == []


def test_skip_leaves_out_one_picture(http, worker):
    id = submitted(http, count=3, steps=30)
    job = worker.find(id)
    next(event for event in told_by(job) if event.name == "step" and event.data["picture"] == 1)
    assert http.post(f"/api/jobs/{id}/skip").status_code == 202
    done = over(http, id)
    assert (done["state"], [each["seed"] for each in done["pictures"]]) == ("done", [7, 9])
    assert done["step"] == done["steps"] < 90
    assert http.post(f"/api/jobs/{id}/skip").status_code == 409


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"steps": 0}, "steps 0 is out of range: 1 to 1000."),
        ({"width": 500}, "width 500 is not a multiple of 8. Nearest: 496 or 504."),
        ({"steps": "many"}, "steps cannot be 'many'."),
        ({"stepz": 3}, "'stepz' does not exist. Did you mean steps?"),
        ({"cfg-scale": 3, "guidance_scale": 4}, "'guidance_scale' sets guidance_scale for the second time."),
        ({"sampler": "eulr"}, "Did you mean euler?"),
        ({"count": 5000}, "5000 pictures are asked for; a job makes at most 1000. Lower count."),
        ({"count": 0}, "count 0 is out of range: at least 1."),
        ({"batch_size": 300, "count": 300, "width": 512, "height": 512}, "Lower batch_size or the size."),
        ({"task": "img2video"}, "task 'img2video' does not exist."),
        ({"task": ["img2img"]}, "task ['img2img'] does not exist."),
        ({"task": "img2img"}, "needs a picture to begin with: give it as init, in base64."),
        ({"init": "aGk="}, "init does nothing with the task txt2img"),
        ({"task": "edit", "init": "GRADIENT"}, "Use it with sd txt2img, sd img2img or sd inpaint."),
        ({"task": "inpaint", "init": "GRADIENT"}, "give either mask"),
        ({"task": "img2img", "init": 7}, "init must be a picture in base64"),
        ({"strength": 0.5}, "strength does nothing without a picture to begin with."),
        ({"model": "other.ckpt"}, "this server has one model, tiny.ckpt, and not other.ckpt."),
        ({"previews": 1}, "previews cannot be 1; it is true or false."),
        ({"prompt": None}, 'no "prompt" given.'),
    ],
)
def test_a_wrong_job_is_refused_with_one_sentence(http, worker, picture, fields, sentence):
    before = len(worker.jobs)
    fields = {name: picture if value == "GRADIENT" else value for name, value in fields.items()}
    sizes = {} if "width" not in fields and "task" in fields else {"width": 64, "height": 64}
    answer = http.post("/api/jobs", json={"prompt": "a", "seed": 7, **sizes, **fields})
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]
    assert answer.json()["error"].count("\n") == 0
    assert len(worker.jobs) == before


@pytest.mark.parametrize(
    ("body", "kind", "status", "sentence"),
    [
        (b"{", "application/json", 400, "the body is not JSON"),
        (b"[1]", "application/json", 400, "a job is a JSON object"),
        (b"[" * 100_000, "application/json", 400, "the body is not JSON"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "application/json", 400, "the body is not JSON"),
        (b'{"prompt": "a", "guidance_scale": NaN}', "application/json", 400, "NaN is no number of JSON"),
        (b"\xff", "application/json", 400, "not UTF-8"),
        (b"prompt=a", "application/x-www-form-urlencoded", 415, "send JSON"),
    ],
)
def test_a_body_that_is_no_job_is_refused(http, body, kind, status, sentence):
    answer = http.post("/api/jobs", content=body, headers={"content-type": kind})
    assert (answer.status_code, sentence in answer.json()["error"]) == (status, True), answer.text


def test_what_is_not_there_is_a_sentence(http):
    for path, status in (
        ("/api/jobs/no", 404),
        ("/pictures/0.png", 404),
        ("/nothing", 404),
        ("/api/jobs/no/stop", 405),
    ):
        answer = http.get(path)
        assert (answer.status_code, set(answer.json())) == (status, {"error"}), path


@pytest.mark.slow
def test_a_full_queue_and_a_server_that_ends_refuse_jobs(tiny_ckpt, tmp_path):
    with working(tiny_ckpt, tmp_path, most_waiting=2) as worker, client(worker) as http:
        first = submitted(http, steps=200)
        next(event for event in told_by(worker.find(first)) if event.name == "step")
        stopped, _ = submitted(http), submitted(http)
        http.post(f"/api/jobs/{stopped}/stop")
        submitted(http)  # it has left its place to another one
        answer = http.post("/api/jobs", json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]) == (503, "2 jobs wait already. Try again later.")
        assert "retry-after" in answer.headers
        worker.close()
        *others, last = [job["state"] for job in http.get("/api/jobs").json()["jobs"]]
        assert others == ["stopped"] * 3
        assert last in ("running", "stopped")  # it ends with its step
        assert over(http, first)["state"] == "stopped"
        assert "about to end" in http.post("/api/jobs", json={"prompt": "a"}).json()["error"]


@pytest.mark.slow
def test_memory_keeps_the_latest_pictures_and_jobs_and_files_stay(tiny_ckpt, tmp_path):
    with working(tiny_ckpt, tmp_path, keep=2) as worker, client(worker) as http:
        done = [over(http, submitted(http, seed=seed, steps=1)) for seed in range(4)]
        found = [http.get(job["pictures"][0]["url"]).status_code for job in done]
        assert found == [404, 404, 200, 200]
        assert len(worker.jobs) <= 3
        assert len(list(tmp_path.glob("*.png"))) == 4


@pytest.mark.slow
def test_a_model_of_the_folder_is_chosen_by_name_or_hash_and_takes_the_place_of_the_other(
    tiny_ckpt, tmp_path, tiny_state
):
    import make_checkpoint

    from convert.files.hashing import file_sha256

    other = tmp_path / "models" / "sub" / "Other.ckpt"
    other.parent.mkdir(parents=True)
    state = {name: value * 1.01 if value.is_floating_point() else value for name, value in tiny_state.items()}
    make_checkpoint.save_original(other, state)
    with working(tiny_ckpt, tmp_path / "out", folder=tmp_path / "models") as worker, client(worker) as http:
        digest = file_sha256(other)
        first = over(http, submitted(http))["pictures"][0]
        for name in ("other", "sub/Other.ckpt", digest[:10], f"Other [{digest[:10]}]"):
            job = over(http, submitted(http, model=name))
            assert job["state"] == "done", job
        assert [row["loaded"] for row in http.get("/api/models").json()["models"]] == [False, True]
        assert "Model: Other" in job["pictures"][0]["infotext"]
        assert http.get("/api/model").json()["name"] == "Other.ckpt"
        back = over(http, submitted(http, model="tiny"))
        assert back["pictures"][0]["sha256"] == first["sha256"]
        assert {"level": "note", "text": "loading tiny.ckpt"} in back["messages"]
        for name in ("../out/x", str(tiny_ckpt), "nothing", "0" * 64):
            answer = http.post("/api/jobs", json={"prompt": "a", "model": name})
            assert (answer.status_code, "does not exist. There are:" in answer.json()["error"]) == (400, True)


def test_the_model_tells_what_it_is_and_what_it_is_used_with(http):
    facts = http.get("/api/model").json()
    assert (facts["name"], facts["native_size"], facts["tasks"]) == (
        "tiny.ckpt",
        512,
        ["txt2img", "img2img", "inpaint"],
    )
    assert (facts["defaults"]["steps"], facts["defaults"]["sampler"]) == (30, "dpmpp_2m")
    assert {"name": "euler_a", "label": "Euler a", "schedule": "linspace"} in facts["samplers"]


def test_tokens_are_those_of_the_command(http):
    facts = http.post("/api/tokens", json={"text": "a (red:1.5) horse, " + "very " * 80}).json()
    assert [token["text"] for token in facts["tokens"][:4]] == ["a ", "red ", "horse ", ", "]
    assert [token["weight"] for token in facts["tokens"][:3]] == [1, 1.5, 1]
    assert (facts["room"], facts["chunks"], facts["beyond"]) == (75, 2, len(facts["tokens"]) - 75)
    assert {token["chunk"] for token in facts["tokens"]} == {1, 2}
    for wrong in ({}, {"text": 1}, {"text": "a", "steps": "x"}, {"text": "a", "more": 1}, {"text": "a\0"}):
        assert http.post("/api/tokens", json=wrong).status_code == 400


def test_a_picture_that_is_sent_gives_its_settings_back(http, picture):
    made = over(http, submitted(http))["pictures"][0]
    data = http.get(made["url"]).content
    for sent in ({"content": data}, {"json": {"picture": base64.b64encode(data).decode()}}):
        answer = http.post("/api/read", **sent).json()
        assert answer["fields"]["prompt"] == "a horse"
        again = over(http, submitted(http, **answer["fields"]))
        assert again["pictures"][0]["sha256"] == made["sha256"]
    answer = http.post("/api/read", json={"picture": picture})
    assert (answer.status_code, answer.json()["error"][:12]) == (422, "the picture ")
    answer = http.post("/api/read", content=b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    assert (answer.status_code, answer.json()["error"][:26]) == (400, "picture is not a picture t")


@pytest.mark.slow
def test_a_finished_picture_is_explained_by_a_page_that_cannot_reach_the_server(http):
    made = over(http, submitted(http))["pictures"][0]
    answer = http.post("/api/explain", json={"picture": made["sha256"]})
    job = over(http, answer.json()["id"])
    assert (job["state"], job["pictures"]) == ("done", []), job
    page = http.get(job["page"])
    assert "<!doctype html>" in page.text[:200].lower()
    assert "sandbox allow-scripts; default-src 'none'" in page.headers["content-security-policy"]
    assert http.post("/api/explain", json={"picture": "0" * 64}).status_code == 404


@pytest.mark.slow
def test_words_and_adapters_of_one_job_are_gone_in_the_next(http, worker, monkeypatch, tmp_path):
    from adapters import lora, lora_shapes
    from embeddings import made_up
    from safetensors.torch import save_file

    before = over(http, submitted(http, prompt="a glow"))["pictures"][0]
    for kind in ("models", "embeddings", "loras"):
        (tmp_path / kind).mkdir()
    monkeypatch.setenv("SD_MODELS", str(tmp_path / "models"))
    save_file({"emb_params": made_up()}, tmp_path / "embeddings" / "glow.safetensors")
    lora(tmp_path / "loras" / "style.safetensors", lora_shapes(), size=0.3)
    facts = http.get("/api/model").json()
    assert (facts["adapters"], facts["embeddings"]) == (["style"], ["glow"])
    with_word = over(http, submitted(http, prompt="a glow"))["pictures"][0]
    with_lora = over(http, submitted(http, prompt="a <lora:style:1> lamp"))
    assert with_lora["state"] == "done", with_lora
    assert "embedding glow: 3 vectors" in str(over(http, submitted(http, prompt="a glow"))["messages"])
    (tmp_path / "embeddings" / "glow.safetensors").unlink()
    after = over(http, submitted(http, prompt="a glow"))["pictures"][0]
    assert before["sha256"] == after["sha256"] != with_word["sha256"]
    for prompt in (f"a <lora:{tmp_path}/loras/style.safetensors:1>", "a <lora:../loras/style:1>", "a <lora:~/x:1>"):
        answer = http.post("/api/jobs", json={"prompt": prompt, **QUICK})
        assert (answer.status_code, "there is no adapter" in answer.json()["error"]) == (400, True), answer.text
        assert str(tmp_path / "models") not in answer.text
    for name in (f"{tmp_path}/loras/style.safetensors", "../loras/style"):
        answer = http.post("/api/jobs", json={"prompt": "a", "lora": [name], **QUICK})
        assert (answer.status_code, "there is no adapter" in answer.json()["error"]) == (400, True), answer.text


def test_two_clients_that_ask_at_once_both_get_theirs(http):
    ids = []
    threads = [threading.Thread(target=lambda seed=seed: ids.append(submitted(http, seed=seed))) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(over(http, id)["pictures"][0]["seed"] for id in ids) == list(range(6))
