"""`sd play`: the folder it writes, the server it starts, and the package that it downloads."""

import base64
import hashlib
import http.client
import io
import json
import re
import socket
import tarfile
import threading
from pathlib import Path

import pytest

from sd.app.errors import UsageError
from sd.app.jobs import extras, npm_package, playing
from sd.app.jobs.npm_package import Package, fetched
from sd.app.jobs.request import Events
from sd.app.jobs.static_server import FolderServer
from sd.config import SD_V1

ROOT = Path(__file__).parents[2]
FACTS = {"name": "made-up", "size": 128}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Stand-ins for what takes minutes: the exported networks, and the runtime."""
    networks, runtime = tmp_path / "networks", tmp_path / "runtime"
    for folder, names in ((networks, ["unet.onnx"]), (runtime, playing.RUNTIME.files)):
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"12345")
    (networks / "model.json").write_text(json.dumps(FACTS))
    monkeypatch.setattr(playing, "exported_networks", lambda events: networks)
    monkeypatch.setattr(playing, "fetched_runtime", lambda events: runtime)


def test_the_folder_has_all_that_the_page_loads_and_is_written_anew(run, parts, tmp_path):
    out = tmp_path / "play"
    assert run("play", "-o", out)[:2] == (0, [str(out)])
    facts = json.loads((out / "model.json").read_text())
    assert facts.items() >= FACTS.items()
    assert facts["files"] == {
        name: (out / name).stat().st_size for name in ("unet.onnx", "ort-wasm-simd-threaded.wasm", "clip_merges.bin")
    }
    page = (out / "index.html").read_text()
    assert "${" not in page
    assert "../course" not in page
    for name in ("page.css", "page.js", "client.js", "worker.js", "engine.js", "NOTICE.txt"):
        assert (out / name).is_file(), name
    (out / "older.txt").touch()
    (tmp_path / "course").mkdir()
    (tmp_path / "course" / "README.md").touch()
    assert run("play", "-o", out)[0] == 0
    assert not (out / "older.txt").exists()
    assert "../course/6-guidance.md" in (out / "index.html").read_text()
    assert not (out / "ort-wasm-simd-threaded.jspi.wasm").exists()
    assert run("play", "-o", out, "--webgpu")[0] == 0
    assert "ort-wasm-simd-threaded.jspi.wasm" in json.loads((out / "model.json").read_text())["files"]


def test_a_folder_of_other_things_is_kept(run, parts, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    code, _, said = run("play", "-o", tmp_path / "mine")
    assert code == 2
    assert "not a folder of sd play, so it is kept" in said
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    code, _, said = run("play", "-o", tmp_path / "no" / "folder")
    assert code == 2
    assert "does not exist. Make it first." in said


def test_a_port_in_use_is_an_error_before_anything_is_built(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, said = run("play", "--port", taken.getsockname()[1])
    assert code == 2
    assert "is in use" in said


def test_without_the_exporter_a_sentence_says_what_to_install(run, monkeypatch, tmp_path):
    monkeypatch.setitem(extras.EXTRAS, "onnx", {"onnx_that_nobody_has": "onnx"})
    code, _, said = run("play", "-o", tmp_path / "play")
    assert code == 2
    assert "pip install 'sd-zoo[onnx]'" in said


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("screen", "flags", "opened"), [(True, [], 1), (True, ["--no-open"], 0), (False, [], 0)])
def test_the_page_is_opened_where_there_is_a_screen(run, parts, monkeypatch, tmp_path, screen, flags, opened):
    addresses = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sd.app.cli.play.has_screen", lambda: screen)
    monkeypatch.setattr("webbrowser.open", addresses.append)
    monkeypatch.setattr(FolderServer, "serve_forever", interrupted)
    code, out, said = run("play", "--port", 0, *flags)
    assert (code, out) == (0, [])
    (address,) = re.findall(r"http://127\.0\.0\.1:\d+/", said)
    assert addresses == [address] * opened


def test_two_that_export_at_once_leave_each_other_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(playing, "require", lambda *_: None)
    old = tmp_path / "cache" / "sd-zoo" / "play-networks" / "0123456789abcdef"
    old.mkdir(parents=True)
    begun = []

    def write_networks(model, tiny_vae, folder, on_file):
        folder.mkdir()
        begun.append(folder)
        if len(begun) == 1:
            playing.exported_networks(Events())
        (folder / "unet.onnx").write_bytes(b"12345")
        return SD_V1

    monkeypatch.setattr("sd.study.play.networks.write_networks", write_networks)
    folder = playing.exported_networks(Events())
    assert len(begun) == 2
    assert [file.name for file in folder.rglob("*.onnx")] == ["unet.onnx"]
    assert list(folder.parent.iterdir()) == [folder]
    assert playing.exported_networks(Events()) == folder
    assert len(begun) == 2


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    (folder / "inner").mkdir(parents=True)
    (folder / "index.html").write_text("<p>hello")
    (folder / "ort.wasm").write_bytes(b"\0asm")
    (tmp_path / "secret.txt").write_text("not for others")
    with socket.create_server(("127.0.0.1", 0)) as sock, FolderServer(folder, sock) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield http.client.HTTPConnection("127.0.0.1", sock.getsockname()[1], timeout=60)
        server.shutdown()
        thread.join()


def asked(server, path):
    server.request("GET", path)
    answer = server.getresponse()
    return answer.status, answer.read(), answer.headers


def test_the_server_lets_pages_use_threads_and_shows_nothing_else(server):
    status, body, headers = asked(server, "/")
    assert (status, body) == (200, b"<p>hello")
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert headers["Content-Security-Policy"].startswith("default-src 'self'; script-src 'self' 'wasm-unsafe-eval';")
    assert asked(server, "/ort.wasm")[2]["Content-Type"] == "application/wasm"
    for path in ("/inner/", "/../secret.txt", "/%2e%2e/secret.txt", "/nothing.js"):
        status, body, _ = asked(server, path)
        assert status == 404, path
        assert b"not for others" not in body


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose archive "arrives" without a network."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, data in (("package/dist/run.mjs", b"export {}"), ("package/dist/other.mjs", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    archive = file.getvalue()

    def download(address, target, **_):
        asked.append(address)
        target.write_bytes(archive)

    asked = []
    monkeypatch.setattr(npm_package, "download", download)
    monkeypatch.setattr(npm_package, "registry", lambda: "https://registry.example")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sha512 = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    files = {"run.mjs": "package/dist/run.mjs"}
    return Package(name="runs", version="1.2.3", size=len(archive), sha512=sha512, files=files), asked


def test_a_package_is_downloaded_once_and_only_its_files_are_kept(package):
    package, asked = package
    folder = fetched(package)
    assert fetched(package) == folder
    assert asked == ["https://registry.example/runs/-/runs-1.2.3.tgz"]
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("run.mjs", b"export {}")]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_archive_that_was_not_published_is_refused_and_deleted(package, tmp_path):
    package, _ = package
    with pytest.raises(UsageError, match="is not the published one"):
        fetched(Package(**{**vars(package), "sha512": "A" * 86 + "=="}))
    assert list((tmp_path / "cache" / "sd-zoo" / "npm").iterdir()) == []


def test_the_server_shows_the_live_model_where_its_folder_is(tmp_path, monkeypatch):
    pytest.importorskip("starlette")
    from starlette.applications import Starlette
    from starlette.routing import Route
    from starlette.testclient import TestClient

    from sd.app.web import play

    routes = [Route(path, handler, methods=[method]) for method, path, handler in play.ROUTES]
    client = TestClient(Starlette(routes=routes), follow_redirects=False)
    monkeypatch.setattr(play, "ready_folder", lambda: None)
    answer = client.get("/play/")
    assert (answer.status_code, "sd play -o docs/play" in answer.text) == (404, True)
    monkeypatch.setattr(play, "ready_folder", lambda: tmp_path)
    (tmp_path / "index.html").write_text('<p>live <a href="../course/1-a.md">Chapter 1</a> <a href="#here">here</a>')
    (tmp_path / "engine.js").write_text("export {}")
    (tmp_path / "inner").mkdir()
    assert client.get("/play").headers["location"] == "play/"
    answer = client.get("/play/")
    assert answer.text == '<p>live Chapter 1 <a href="#here">here</a>'
    assert client.get("/play/engine.js").headers["content-type"].startswith("text/javascript")
    assert answer.headers["cross-origin-embedder-policy"] == "require-corp"
    assert client.get("/play/inner").status_code == client.get("/play/..").status_code == 404


def test_a_folder_in_the_cache_is_found(parts, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    written = playing.current_folder(Events())
    assert written == tmp_path / "cache" / "sd-zoo" / "play"
    assert playing.ready_folder() in (written, ROOT / "docs" / "play")  # which a checkout may have
