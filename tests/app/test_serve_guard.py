"""Who may ask the server what: hosts, origins, tokens, sizes, times, and names that are no paths."""

import base64
import io
import json
import socket
import struct
import sys
import time
import zipfile
import zlib

import pytest
from served import client, listening_server, submitted, working

pytest.importorskip("starlette")

from sd.app.web import guard
from sd.app.web.guard import Guesses, Rules

JOB = {"prompt": "a horse", "width": 64, "height": 64}
OPENED = []  # paths that the process opens, while a test looks
sys.addaudithook(lambda event, given: OPENED.append(str(given[0])) if event == "open" and OPENED else None)


@pytest.fixture(scope="module")
def worker(tiny_ckpt, tmp_path_factory):
    """It queues jobs, and does not begin them."""
    with working(tiny_ckpt, tmp_path_factory.mktemp("served") / "out", start=False, most_waiting=1000) as worker:
        yield worker


@pytest.fixture(scope="module")
def server(tiny_ckpt, tmp_path_factory):
    """The worker and the port of a server that does the same."""
    out = tmp_path_factory.mktemp("listening")
    with working(tiny_ckpt, out, start=False) as worker, listening_server(worker) as port:
        yield worker, port


@pytest.fixture
def asked(worker):
    """Ask with these headers: the status, and whether a job was queued."""

    def asked(headers=(), rules=None, *, method="POST", path="/api/jobs", **options):
        before = len(worker.jobs)
        options = options or {"json": JOB}
        with client(worker, rules) as http:
            answer = http.request(method, path, headers=dict(headers), **({} if method == "GET" else options))
        return answer, len(worker.jobs) > before

    return asked


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"origin": "http://127.0.0.1:7860"}, True),
        ({"origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"origin": "https://evil.example"}, False),
        ({"origin": "http://127.0.0.1:9999"}, False),
        ({"origin": "http://localhost:7860"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://[x"}, False),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, False),
    ],
)
def test_no_page_of_another_site_starts_a_job(asked, headers, allowed):
    answer, queued = asked(headers)
    assert (answer.status_code, queued) == ((202, True) if allowed else (403, False))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("origin", [{"origin": "https://evil.example"}, {}])
def test_no_form_starts_a_job(asked, kind, origin):
    """A browser sends these without asking first; old ones, without saying where from."""
    answer, queued = asked({"content-type": kind, **origin}, content=json.dumps(JOB).encode())
    assert (answer.status_code, queued) == (403 if origin else 415, False)


def test_a_page_elsewhere_may_lead_here_and_not_read(asked):
    cross = {"sec-fetch-site": "cross-site"}
    assert asked({**cross, "sec-fetch-mode": "navigate"}, method="GET", path="/api/models")[0].status_code == 200
    assert asked({**cross, "sec-fetch-mode": "no-cors"}, method="GET", path="/api/models")[0].status_code == 403
    answer, _ = asked(method="GET", path="/api/models")
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:7860", True),
        ("localhost:8000", True),
        ("[::1]:7860", True),
        ("192.168.0.7:7860", True),
        ("studio.example", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example:7860", False),
        ("evil.example@127.0.0.1", True),  # is 127.0.0.1
        ("[x", False),
        ("", False),
    ],
)
def test_a_name_that_was_pointed_here_is_refused(asked, host, allowed):
    """DNS rebinding: the page and the server then seem to be of one origin."""
    rules = Rules(hosts=frozenset({"studio.example"}))
    for headers in ({"host": host}, {"host": host, "origin": f"http://{host}"}):
        answer, queued = asked(headers, rules)
        assert queued == allowed or (headers.get("origin") and answer.status_code == 403)
        assert allowed or answer.status_code == 403


def test_allowed_origins_are_told_so_and_others_are_not(asked):
    rules = Rules(origins=frozenset({"https://chat.example"}), token="correct horse")
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for origin, status in (("https://chat.example", 204), ("https://evil.example", 403)):
        answer, _ = asked({"origin": origin, **preflight}, rules, method="OPTIONS")
        assert answer.status_code == status
        assert (answer.headers.get("access-control-allow-origin") == origin) == (status == 204)
    headers = {"origin": "https://chat.example", "authorization": "Bearer correct horse"}
    answer, queued = asked(headers, rules)
    assert queued
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    assert answer.headers["vary"] == "Origin"


BASIC = base64.b64encode(b"anybody:correct horse").decode()


@pytest.mark.parametrize(
    ("authorization", "allowed"),
    [
        ("Bearer correct horse", True),
        ("bearer correct horse", True),
        (f"Basic {BASIC}", True),
        (None, False),
        ("Bearer correct hors", False),
        ("Bearer correct horse!", False),
        ("Bearer ", False),
        ("Basic !", False),
        ("Digest correct horse", False),
        ("Bearer \u00e9", False),
    ],
)
def test_every_request_bears_the_token(asked, authorization, allowed):
    rules = Rules(token="correct horse")
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    for path in ("/api/jobs", "/nothing"):
        answer, queued = asked(headers, rules, path=path)
        if not allowed:
            assert (answer.status_code, queued) == (401, False)
            assert answer.headers["www-authenticate"].startswith("Basic ")
    assert asked(headers, rules)[1] == allowed
    assert asked({}, rules, method="GET", path="/api/health")[0].status_code == 200


def test_guesses_are_slowed_for_their_address_and_compared_in_constant_time(asked, monkeypatch):
    clock, compared = [0.0], []
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    rules = Rules(token="correct horse", guesses=Guesses(lambda: clock[0]))
    wrong, right = ({"authorization": f"Bearer {token}"} for token in ("wrong", "correct horse"))
    found = [asked(wrong, rules)[0].status_code for _ in range(15)]
    assert found == [401] * 10 + [429] * 5
    assert compared == [(b"wrong", b"correct horse")] * 10
    answer, queued = asked(right, rules)
    assert (answer.status_code, queued, int(answer.headers["retry-after"]) > 0) == (429, False, True)
    clock[0] += 2
    assert asked(right, rules)[1]
    clock[0] += 1000
    assert [asked(wrong, rules)[0].status_code for _ in range(11)] == [401] * 10 + [429]


def test_addresses_are_counted_apart_and_those_of_one_owner_together():
    guesses = Guesses(lambda: 0.0)
    for _ in range(10):
        guesses.failed("2001:db8::1")
    assert guesses.wait("2001:db8::ffff:1") > 0
    assert guesses.wait("2001:db8:0:1::1") == guesses.wait("10.0.0.1") == 0


def raw(port, head, *parts, pause=0.0):
    """What a server answers to these bytes, sent with pauses."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        try:
            for part in (head, *parts):
                sock.sendall(part)
                time.sleep(pause)
        except OSError:  # it has closed the connection; the answer may still be read
            pass
        found = b""
        try:
            while piece := sock.recv(1 << 16):
                found += piece
        except OSError:
            pass
        return found.decode()


def head(length=None, *lines):
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    rows = ["POST /api/jobs HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", size, *lines]
    return "\r\n".join([*rows, "", ""]).encode()


def test_bodies_that_are_too_long_too_slow_or_packed_are_refused_and_the_server_goes_on(server, monkeypatch):
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    worker, port = server
    before = len(worker.jobs)
    answers = {
        "1 GB, as it says": raw(port, head(10**9)),
        "1 GB, which comes": raw(port, head(10**9), b"x" * 10**6),
        "more digits than a number": raw(port, head("9" * 5000)),
        "without end": raw(port, head(), *[chunk] * 80),
        "packed": raw(port, head(20, "Content-Encoding: gzip"), b"x" * 20),
        "no HTTP": raw(port, b"\x16\x03\x01\x02\x00\x01\r\n\r\n"),
        "two hosts": raw(port, b"GET /api/health HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n"),
    }
    monkeypatch.setattr(guard, "PAUSE_SECONDS", 0.3)
    monkeypatch.setattr(guard, "BODY_SECONDS", 1.0)
    monkeypatch.setattr("sd.app.web.server.HEAD_SECONDS", 0.5)
    answers |= {
        "never comes": raw(port, head(100)),
        "a byte at a time": raw(port, head(100), *[b"x"] * 12, pause=0.15),
        "a head that never ends": raw(port, b"GET / HTTP/1.1\r\nHost: x\r\n"),
        "after all that": raw(port, b"GET /api/health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"),
    }
    status = {name: answer[9:12] for name, answer in answers.items()}
    assert status == {
        "1 GB, as it says": "413",
        "1 GB, which comes": "413",
        "more digits than a number": "400",
        "without end": "413",
        "never comes": "408",
        "a byte at a time": "408",
        "packed": "415",
        "a head that never ends": "",
        "no HTTP": "400",
        "two hosts": "400",
        "after all that": "200",
    }
    assert len(worker.jobs) == before


def png(width, height, *chunks):
    """The beginning of a PNG that says it is that large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(b"\0" * min(10**6, height * (1 + 3 * width))))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*each) for each in chunks) + rows + chunk(b"IEND", b"")


def zip_bomb():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"\0" * 10**7)
    return file.getvalue()


TEXT_BOMB = (b"zTXt", b"parameters\0\0" + zlib.compress(b"\0" * 10**8))
NO_PICTURES = {
    "a picture of 60000x60000 pixels": (png(60_000, 60_000), "init.png has 60000x60000 pixels; at most 64 million"),
    "fewer pixels than it says": (png(5000, 5000), "init.png is cut off or damaged"),
    "a zip": (zip_bomb(), "init is not a picture that is read here"),
    "SVG": (
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
        "init is not a picture",
    ),
    "HTML": (b"<!doctype html><script>alert(1)</script>", "init is not a picture"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "init is not a picture"),
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_or_a_bomb_is_refused_with_a_sentence_that_names_no_place(asked, name):
    data, sentence = NO_PICTURES[name]
    answer, queued = asked(json={"prompt": "a", "task": "img2img", "init": base64.b64encode(data).decode()})
    assert (answer.status_code, queued) == (400, False)
    assert answer.json()["error"].startswith(sentence)
    assert "/" not in answer.json()["error"]


def test_a_text_in_a_picture_does_not_fill_the_memory(asked):
    data = base64.b64encode(png(64, 64, TEXT_BOMB)).decode()
    started = time.process_time()
    assert asked(json={"prompt": "a", "task": "img2img", "init": data})[1]
    assert asked(path="/api/read", json={"picture": data})[0].status_code == 400
    assert time.process_time() - started < 5


@pytest.fixture
def secrets(tmp_path, monkeypatch):
    """Files that nobody may open by a request, in the working folder and elsewhere."""
    from adapters import lora, lora_shapes
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    lora(tmp_path / "secret.safetensors", lora_shapes())
    Image.new("RGB", (64, 64)).save(tmp_path / "secret.png")
    return tmp_path


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a <lora:secret.safetensors:1>"},
        {"prompt": "a <lora:HERE/secret.safetensors:1>"},
        {"prompt": "a <lora:../secret:1>"},
        {"prompt": "a", "lora": ["HERE/secret.safetensors"]},
        {"prompt": "a", "lora": "./secret.safetensors:1:1"},
        {"prompt": "embedding:HERE/secret.safetensors"},
        {"prompt": "embedding:../secret"},
        {"prompt": "a", "task": "img2img", "init": "HERE/secret.png"},
        {"prompt": "a", "task": "img2img", "init": "secret.png"},
        {"prompt": "a", "task": "img2img", "init": "file://HERE/secret.png"},
        {"prompt": "a", "task": "img2img", "init": "http://127.0.0.1:1/secret.png"},
        {"prompt": "a", "model": "HERE/secret.safetensors"},
        {"prompt": "a", "model": "secret.safetensors"},
        {"prompt": "a", "model": "../../secret"},
        {"prompt": "a", "out": "HERE/made/"},
        {"prompt": "a", "vae": "HERE/secret.safetensors"},
        {"prompt": "a", "like": "HERE/secret.png"},
        {"prompt": "a", "embeddings": ["HERE"]},
        {"prompt": "a", "from_file": "HERE/secret.png"},
        {"prompt": "a", "refiner": "HERE/secret.safetensors"},
    ],
)
def test_no_path_in_a_job_is_opened(asked, secrets, fields):
    text = json.dumps({**JOB, **fields}).replace("HERE", str(secrets))
    OPENED[:] = ["looking"]
    asked({"content-type": "application/json"}, content=text.encode())
    open(__file__).close()
    seen = OPENED[1:]
    OPENED.clear()
    assert __file__ in seen, "the hook does not see what is opened"
    assert not [path for path in seen if "secret" in path]
    assert not (secrets / "made").exists()


@pytest.mark.parametrize(
    "path",
    [
        "/pictures/../secret.png",
        "/pictures/..%2fsecret.png",
        "/pictures/%2fetc%2fpasswd.png",
        "/pictures/secret.png",
        "/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/api/jobs/..%2f..%2fsecret",
        "/api/jobs/%00/events",
        "/static/../../secret.png",
    ],
)
def test_no_path_in_an_address_is_opened(server, secrets, path):
    answer = raw(server[1], f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
    assert answer[9:12] == "404"
    assert "application/json" in answer


def test_html_in_a_prompt_stays_text(worker):
    with client(worker) as http:
        prompt = "<script>alert(1)</script><img src=x onerror=alert(1)>"
        answer = http.get(f"/api/jobs/{submitted(http, prompt=prompt)}")
        tokens = http.post("/api/tokens", json={"text": prompt})
        wrong = http.post("/api/jobs", json={"prompt": "a", prompt: 1})
    for each in (answer, tokens, wrong):
        assert each.headers["content-type"] == "application/json"
        assert each.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in, which needs a token."),
        (["--host", "::"], "lets other machines in, which needs a token."),
        (["--host", "no.such.host.invalid", "--token", "long enough"], "--host no.such.host.invalid cannot be used"),
        (["--token", "short"], "a token has at least 8 ASCII characters"),
        (["--models", "nothing"], "--models nothing is not a folder."),
        (["--port", "70000"], "--port 70000 is out of range: 0 to 65535."),
        (["--port", "TAKEN"], "is in use. Give another one: --port "),
        (["--allow-origin", "chat.example"], "--allow-origin chat.example is not an origin."),
        (["--out", "x.jpg"], "only .png pictures are written"),
        (["-m", "nothing.ckpt"], "nothing.ckpt does not exist"),
    ],
)
def test_a_server_that_cannot_be_started_says_why_before_it_loads_anything(run, monkeypatch, arguments, sentence):
    from conftest import refused

    monkeypatch.delenv("SD_TOKEN", raising=False)
    monkeypatch.setattr("sd.runtime.loading.from_checkpoint", lambda *_: pytest.fail("weights are read"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused(run("serve", *[taken.getsockname()[1] if each == "TAKEN" else each for each in arguments]), sentence)
