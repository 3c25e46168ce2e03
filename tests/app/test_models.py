"""The table of published checkpoints, and downloads from a server of ours that misbehaves in every way we know of."""

import hashlib
import http.server
import json
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from convert.files import hashing
from convert.published import known as known_module
from convert.published.download import RETRIES, DownloadError, download
from convert.published.known import find_by_name, find_by_sha256, known_checkpoints, known_named, verify
from convert.published.partial_file import BusyError, PartialFile
from sd.app.cli.models import token_for
from sd.app.jobs.model_folder import find
from sd.config import list_models
from sd.files import cache_folder

CONTENT = bytes(range(256)) * 20_000  # 5.12 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HASH = re.compile("[0-9a-f]{64}")
KEPT = ["model.ckpt.partial", "model.ckpt.partial.json"]


@dataclass
class Behaviour:
    """What the server does; requests are noted."""

    content: bytes = CONTENT
    etag: str | None = '"one"'
    ranges: bool = True
    cut_after: list[int] = field(default_factory=list)  # bytes of each answer, until the list is empty
    statuses: list[int] = field(default_factory=list)  # of the first answers
    announced: int | None = None  # another length than the true one
    length: bool = True
    content_type: str = "application/octet-stream"
    redirect: str | None = None
    wants_token: str | None = None
    range_from: int | None = None  # answers with another part than was asked for
    range_says: str | None = None  # another Content-Range
    raw: object = None  # a function that is given the file to write to, in place of an answer
    requests: list[dict] = field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        do: Behaviour = self.server.behaviour
        do.requests.append({name.lower(): value for name, value in self.headers.items()} | {"path": self.path})
        if do.raw:
            with suppress(OSError):
                do.raw(self.wfile)
            return
        if do.redirect and self.path == "/file":
            self.send_response(302)
            self.send_header("Location", do.redirect)
            self.end_headers()
            return
        if do.statuses:
            self.send_error(do.statuses.pop(0))
            return
        if do.wants_token and self.headers.get("Authorization") != f"Bearer {do.wants_token}":
            self.send_error(401)
            return
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and do.ranges and self.headers.get("If-Range", do.etag) == do.etag:
            start = int(asked[1])
            if start >= len(do.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(do.content)}")
                self.end_headers()
                return
            start = start if do.range_from is None else do.range_from
            self.send_response(206)
            says = do.range_says or f"bytes {start}-{len(do.content) - 1}/{len(do.content)}"
            self.send_header("Content-Range", says)
        else:
            self.send_response(200)
        body = do.content[start:]
        if do.length:
            self.send_header("Content-Length", str(len(body) if do.announced is None else do.announced))
        if do.etag:
            self.send_header("ETag", do.etag)
        self.send_header("Content-Type", do.content_type)
        self.end_headers()
        if do.cut_after:
            body = body[: do.cut_after.pop(0)]
        with suppress(OSError):
            self.wfile.write(body)


def serve(behaviour):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.behaviour = behaviour
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


@pytest.fixture
def server():
    server = serve(Behaviour())
    yield SimpleNamespace(
        do=server.behaviour, port=server.server_port, address=f"http://127.0.0.1:{server.server_port}/file"
    )
    server.shutdown()
    server.server_close()


@pytest.fixture
def get(server, tmp_path):
    """Download the file; the waits that there would have been are returned instead of waited for."""

    def get(**options):
        waits = []
        options = {"sha256": SHA256} | options
        done = download(options.pop("address", server.address), tmp_path / "model.ckpt", wait=waits.append, **options)
        assert (tmp_path / "model.ckpt").read_bytes() == server.do.content
        assert os.listdir(tmp_path) == ["model.ckpt"]
        return done, waits

    return get


def refused(tmp_path, get, *parts, left=()):
    with pytest.raises(DownloadError) as caught:
        get()
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "model.ckpt").exists()
    assert set(os.listdir(tmp_path)) == set(left)


def stop(tmp_path, get, server):
    """A download that gets no further than 1 MB."""
    server.do.cut_after = [1_000_000] + [0] * RETRIES
    refused(tmp_path, get, "times in a row", "1 MB is kept", left=KEPT)
    server.do.cut_after = []


def test_a_file_arrives_whole_and_checked(get, server):
    started, arrived = [], []
    done, waits = get(size=len(CONTENT), on_start=lambda *a: started.append(a), on_bytes=arrived.append)
    assert (done.bytes, done.sha256, done.resumed_from) == (len(CONTENT), SHA256, 0)
    assert started == [(len(CONTENT), 0)]
    assert sum(arrived) == len(CONTENT)
    assert waits == []
    assert len(server.do.requests) == 1


def test_dropped_connections_are_gone_on_with(get, server):
    server.do.cut_after = [100_000, 1, 2_000_000]
    arrived = []
    _, waits = get(on_bytes=arrived.append)
    ranges = [request.get("range") for request in server.do.requests]
    assert ranges == [None, "bytes=100000-", "bytes=100001-", "bytes=2100001-"]
    assert {request.get("if-range") for request in server.do.requests} == {None, '"one"'}
    assert sum(arrived) == len(CONTENT)
    assert waits == [2, 2, 2]  # each attempt brought something


def test_a_later_run_goes_on_where_the_first_stopped(get, server, tmp_path):
    stop(tmp_path, get, server)
    done, _ = get()
    assert done.resumed_from == 1_000_000
    assert server.do.requests[-1]["range"] == "bytes=1000000-"


def test_a_complete_beginning_is_only_checked(get, server, tmp_path):
    stop(tmp_path, get, server)
    (tmp_path / "model.ckpt.partial").write_bytes(CONTENT)
    before = len(server.do.requests)
    done, _ = get()  # the length is not known: the server says that there is no more
    assert done.resumed_from == len(CONTENT)
    assert len(server.do.requests) == before + 1


def test_another_version_is_fetched_from_the_start(get, server, tmp_path):
    stop(tmp_path, get, server)
    server.do.content, server.do.etag = CONTENT[::-1], '"two"'
    arrived = []
    get(sha256=hashlib.sha256(CONTENT[::-1]).hexdigest(), on_bytes=arrived.append)
    assert arrived[0] == -1_000_000


def test_a_beginning_from_another_address_is_not_gone_on_with(get, server, tmp_path):
    stop(tmp_path, get, server)
    done, _ = get(address=server.address + "?mirror")
    assert done.resumed_from == 0


@pytest.mark.parametrize("server_is", [{"ranges": False}, {"etag": None}, {"etag": 'W/"weak"'}])
def test_without_ranges_or_a_version_everything_is_fetched_again(get, server, server_is):
    vars(server.do).update(server_is, cut_after=[3_000_000])
    arrived = []
    get(on_bytes=arrived.append)
    assert (sum(arrived), len(server.do.requests)) == (len(CONTENT), 2)
    assert "range" not in server.do.requests[-1] or not server.do.ranges


@pytest.mark.parametrize("notes", ["", "{", "[]", '{"address": 1}', "null"])
def test_damaged_notes_make_it_start_again(get, server, tmp_path, notes):
    (tmp_path / "model.ckpt.partial").write_bytes(b"rubbish")
    (tmp_path / "model.ckpt.partial.json").write_text(notes)
    assert get()[0].resumed_from == 0


@pytest.mark.parametrize(
    ("behaviour", "parts", "left"),
    [
        ({"announced": len(CONTENT) + 5, "ranges": False},
         [f"failed {RETRIES + 1} times in a row", "run the same command again to resume"], KEPT),
        ({"content": CONTENT[:-1] + b"x"}, ["sha256", SHA256, "removed"], []),
        ({"statuses": [404]}, ["does not exist (HTTP 404)"], []),
        ({"statuses": [403]}, ["HF_TOKEN"], []),
        ({"statuses": [401]}, ["HF_TOKEN"], []),
        ({"statuses": [400]}, ["HTTP 400"], []),
        ({"content_type": "text/html; charset=utf-8"}, ["web page", "HF_TOKEN"], []),
        ({"cut_after": [1_000_000], "range_from": 7}, ["another part"], KEPT),
        *(({"cut_after": [1_000_000], "range_says": text}, ["another part"], KEPT)
          for text in ("bytes 1000000-7/5120000", "bytes 1000000-5119999/7", "bytes 1000000-5120000/5120000",
                       "bytes */5", "x")),
        *(({"redirect": to}, ["redirects to", to, "not a web address"], [])
          for to in ("file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "javascript:x")),
        *(({"redirect": to}, ["leads to an invalid address"], [])
          for to in ("http://[::1", "http://x:y/", "http://" + "a" * 64 + "/", "http://127.0.0.1:99999/", "http://a..b/")),
        ({"redirect": "/file"}, ["redirected without end"], []),
        ({"raw": lambda file: file.write(b"HTTP/1.1 302 Found\r\n\r\n")}, ["does not say where to"], []),
        ({"content": b""}, ["is empty"], []),
        ({"raw": lambda file: file.write(b"garbage" * 1000)}, ["not valid HTTP"], []),
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_used_is_refused(get, server, tmp_path, behaviour, parts, left):
    vars(server.do).update(behaviour)
    refused(tmp_path, get, *parts, left=left)
    assert "statuses" not in behaviour or len(server.do.requests) == 1  # a refusal is final


def forever(*pieces):
    """Writes the first pieces once and the last one until the reader has gone."""

    def write(file):
        for piece in pieces[:-1]:
            file.write(piece)
        while True:
            file.write(pieces[-1])

    return write


def dripping(*pieces):
    """The same, slowly."""

    def write(file):
        for piece in pieces[:-1]:
            file.write(piece)
        while True:
            file.write(pieces[-1])
            file.flush()
            time.sleep(0.005)

    return write


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (forever(b"HTTP/1.1 100 Continue\r\n\r\n"), "more than 1048576 bytes before the file"),
        (forever(b"HTTP/1.1 100 Continue\r\n", b"A: b\r\n"), "more than 1048576 bytes|not valid HTTP"),
        (forever(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"), "not valid HTTP"),
        (forever(b"HTTP/1.1 200 OK\r\nA: ", b"b" * 1000), "not valid HTTP"),
        (forever(b"HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n", b"b" * 1000), "more than 1048576 bytes"),
        (dripping(b"HTTP/1.1 100 Continue\r\n\r\n"), "bytes in 0.05 seconds"),
        (dripping(b"H"), "bytes in 0.05 seconds"),
        (dripping(b"HTTP/1.1 200 OK\r\n\r\n", b"b"), "bytes in 0.05 seconds. .* is kept; .* --from ADDRESS"),
        (dripping(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"), "bytes in 0.05 seconds"),
        (dripping(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1;"), "bytes in 0.05 seconds"),
    ],
)
def test_what_never_ends_is_given_up(get, server, tmp_path, monkeypatch, raw, part):
    if "seconds" in part:
        monkeypatch.setattr("convert.published.connection.PERIOD", 0.05)
    server.do.raw = raw
    with pytest.raises(DownloadError, match=part):
        get()
    assert len(server.do.requests) == 1


def test_a_host_that_cannot_be_reached_is_given_up_at_once(tmp_path, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    waits = []
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1 cannot be reached: Connection refused\."):
        download("http://127.0.0.1:9/file", tmp_path / "x", wait=waits.append)
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    with pytest.raises(DownloadError, match=r"nowhere\.invalid cannot be reached: Name or service not known"):
        download("https://nowhere.invalid/file", tmp_path / "x", wait=waits.append)
    assert (waits, os.listdir(tmp_path)) == ([], [])


def test_a_connection_has_ten_seconds_and_an_answer_thirty(get, server, monkeypatch):
    connect, given = socket.create_connection, []

    def noted(address, timeout, *others):
        given.append((timeout, connect(address, timeout, *others)))
        return given[-1][1]

    monkeypatch.setattr("socket.create_connection", noted)
    arrived = []
    get(on_bytes=lambda count: arrived.append(given[0][1].gettimeout()))
    assert (given[0][0], set(arrived)) == (10, {30})


def test_a_network_that_goes_away_is_waited_for(get, server, tmp_path, monkeypatch):
    """Once there was an answer, a connection that cannot be made is tried again."""
    opener, answers = urllib.request.OpenerDirector.open, iter([True, False, True])
    server.do.cut_after = [1_000_000]

    def open_sometimes(*args, **options):
        if not next(answers):
            raise urllib.error.URLError(OSError(101, "Network is unreachable"))
        return opener(*args, **options)

    monkeypatch.setattr("urllib.request.OpenerDirector.open", open_sometimes)
    _, waits = get()
    assert waits == [2, 4]


def test_a_proxy_of_the_environment_is_used_and_named(get, server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{server.port}")
    monkeypatch.setenv("no_proxy", "")
    get(address="http://nowhere.invalid/file")
    assert server.do.requests[0]["path"] == "http://nowhere.invalid/file"
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    (tmp_path / "model.ckpt").unlink()
    refused(tmp_path, lambda: get(address="http://nowhere.invalid/file"),
            "nowhere.invalid, through the proxy 127.0.0.1:9, cannot be reached")  # fmt: skip


@pytest.mark.parametrize("name", ["model.ckpt.partial", "model.ckpt.partial.json"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "second name", "pipe", "folder", "another user's"])
def test_what_lies_in_place_of_the_partial_file_is_left_alone(get, server, tmp_path, tmp_path_factory, name, kind):
    victim, path = tmp_path_factory.mktemp("other") / "victim", tmp_path / name
    victim.write_bytes(b"precious")
    if kind == "another user's" and (not hasattr(os, "geteuid") or os.geteuid() != 0):
        pytest.skip("only root can give files away")
    plant = {
        "link": lambda: path.symlink_to(victim),
        "dangling link": lambda: path.symlink_to(victim.with_name("new")),
        "second name": lambda: os.link(victim, path),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "another user's": lambda: (path.write_bytes(b"theirs"), os.chown(path, 12345, -1)),
    }
    plant[kind]()
    if name.endswith(".json") and kind != "folder":  # replaced, never written through
        get()
    else:
        with pytest.raises(OSError, match=re.escape(name)):
            get()
        assert os.path.lexists(path)
        assert not (tmp_path / "model.ckpt").exists()
    assert victim.read_bytes() == b"precious"
    assert os.listdir(victim.parent) == ["victim"]


def test_a_server_that_announces_another_length_is_refused_at_once(get, server, tmp_path):
    refused(tmp_path, lambda: get(size=len(CONTENT) + 1), "announces 5120000 bytes", "has 5120001")
    assert len(server.do.requests) == 1


def test_without_a_length_the_file_is_checked_and_no_more_is_taken(get, server, tmp_path):
    server.do.length = False
    refused(tmp_path, lambda: get(size=1000), "sends more than", left=[])
    get(size=len(CONTENT))


def test_an_overloaded_server_is_asked_again(get, server):
    server.do.statuses = [503, 429, 500]
    problems = []
    _, waits = get(on_wait=lambda problem, seconds: problems.append(problem))
    assert waits == [2, 4, 8]
    assert problems == ["HTTP 503", "HTTP 429", "HTTP 500"]


def test_a_redirect_within_the_host_keeps_the_token_and_the_range(get, server):
    vars(server.do).update(redirect="/elsewhere", wants_token="secret", cut_after=[1_000_000])
    get(token="secret")
    assert server.do.requests[-1]["range"] == "bytes=1000000-"
    assert server.do.requests[-1]["if-range"] == '"one"'


def test_a_redirect_to_another_host_gets_no_token(get, server):
    other = serve(Behaviour())
    server.do.redirect = f"http://localhost:{other.server_port}/elsewhere"
    try:
        get(token="secret")
    finally:
        other.shutdown()
        other.server_close()
    assert server.do.requests[0]["authorization"] == "Bearer secret"
    assert "authorization" not in other.behaviour.requests[0]


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://x/y", "model", "http://", "http://[", "http://x:y/z"])
def test_what_is_no_web_address_is_not_opened(tmp_path, address):
    with pytest.raises(DownloadError, match="not an http or https address"):
        download(address, tmp_path / "x")
    with pytest.raises(DownloadError, match="refused"):  # nobody is there
        download("http://127.0.0.1:9/file", tmp_path / "x", wait=lambda seconds: None)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_noticed_before(get, server, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.published.download.shutil.disk_usage", lambda path: SimpleNamespace(free=65 << 20))
    refused(tmp_path, get, "68.2 MB free", "5.12 MB more is needed")


def test_an_existing_file_is_not_replaced_unless_asked(get, server, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        get()
    assert (tmp_path / "model.ckpt").read_bytes() == b"mine"
    assert server.do.requests == []
    get(force=True)


def test_two_downloads_of_one_file_do_not_mix(tmp_path):
    pytest.importorskip("fcntl")
    with PartialFile(tmp_path / "x", "http://a/x"), pytest.raises(BusyError, match="another download"):
        PartialFile(tmp_path / "x", "http://a/x")


def test_the_table_is_complete_and_says_where_it_is_from():
    files = [known.file for known in known_checkpoints()]
    assert len(files) == len(set(files)) == len({known.sha256 for known in known_checkpoints()})
    families = {"sd-v1", "sd-v1-inpainting", "sd-v2", "sd-v2-inpainting", "sd-v2-depth", "sdxl", "sdxl-refiner"}
    assert {known.family for known in known_checkpoints()} == families <= set(list_models())
    for known in known_checkpoints():
        assert known.address.startswith("https://huggingface.co/")
        assert known.address.endswith("/resolve/main/" + known.file)
        assert known.sha256 is None or HASH.fullmatch(known.sha256)
        assert known.bytes is None or 4e9 < known.bytes < 8e9
        for fact, value in (("sha256", known.sha256), ("bytes", known.bytes)):
            assert (value is None) == (known.sources[fact] is None)
            assert value is None or known.sources[fact].startswith("https://")
        assert known.licence in ("CreativeML Open RAIL-M", "CreativeML Open RAIL++-M", "Stability AI Community")


def test_sizes_go_with_the_numbers_of_parameters():
    """The numbers of parameters are those of the networks themselves (`test_config.py` counts those of v1);
    beside them lie 12 tables of 1000, two counters, 77 position ids, and a header of names."""
    v1 = 4 * (859_520_964 + 83_653_863 + 123_060_480 + 12_000 + 2) + 8 * 77
    v2 = 4 * (865_910_724 + 83_653_863 + 354_032_641 + 12_000 + 2)
    for name, size in (("v1-5-pruned-emaonly.safetensors", v1), ("v2-1_768-ema-pruned.safetensors", v2)):
        assert 100_000 < find_by_name(name).bytes - size < 300_000
    assert find_by_name("v1-5-pruned.safetensors").bytes - v1 - 4 * 859_520_964 < 400_000


def test_names_are_found_with_and_without_their_ending():
    assert find_by_name("SD-v1-4.CKPT").file == "sd-v1-4.ckpt"
    assert find_by_name("sd_xl_base_1.0").file == "sd_xl_base_1.0.safetensors"
    assert find_by_name("v1-5-pruned-emaonly").file == "v1-5-pruned-emaonly.safetensors"  # of two
    assert find_by_name("v1-5") is None
    assert {known.file for known in known_named("V1-4")} == {"sd-v1-4.ckpt", "sd-v1-4-full-ema.ckpt"}
    assert find_by_sha256(None) is None


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A table with one small file."""
    row = known_checkpoints()[0]
    made_up = [
        known_module.Known(**(vars(row) | {"file": "small.ckpt", "bytes": 7, "sha256": hash_of(b"weights")})),
        known_module.Known(**(vars(row) | {"file": "unsized.ckpt", "bytes": None, "sha256": hash_of(b"others")})),
    ]
    monkeypatch.setattr(known_module, "known_checkpoints", lambda: tuple(made_up))
    monkeypatch.setattr("sd.app.cli.models.known_checkpoints", lambda: tuple(made_up))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return made_up


def hash_of(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def run(call):
    return lambda *arguments: call("models", *arguments)


def test_the_list_has_a_line_for_each(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert out == run("list")[1]
    for known in known_checkpoints():
        assert sum(line.split()[0] == known.file for line in out.splitlines() if line) == 1
    _, out, _ = run("list", "--json")
    assert [json.loads(line)["file"] for line in out.splitlines()] == [known.file for known in known_checkpoints()]


def test_get_fetches_checks_and_tells_where(run, server, published):
    published[0] = known_module.Known(
        **(vars(published[0]) | {"bytes": len(CONTENT), "sha256": SHA256, "address": server.address})
    )
    code, out, err = run("get", "small.ckpt", "-o", "folder/new")
    assert (code, out) == (0, "folder/new/small.ckpt\n")
    assert "CreativeML Open RAIL-M" in err
    assert Path("folder/new/small.ckpt").read_bytes() == CONTENT
    requests = len(server.do.requests)
    code, out, err = run("get", "small.ckpt", "-o", "folder/new")  # it is there
    assert (code, out) == (0, "folder/new/small.ckpt\n")
    assert "already" in err
    assert len(server.do.requests) == requests
    Path("folder/new/small.ckpt").write_bytes(b"mine")
    code, out, err = run("get", "small.ckpt", "-o", "folder/new")
    assert (code, out) == (2, "")
    assert "--force" in err
    assert run("get", "small", "-o", "folder/new", "--force")[0] == 0
    assert Path("folder/new/small.ckpt").read_bytes() == CONTENT


def test_get_from_elsewhere_is_checked_all_the_same(run, server, published):
    code, out, err = run("get", "small.ckpt", "--from", server.address)
    assert (code, out) == (2, "")
    assert "announces 5120000 bytes; small.ckpt has 7" in err
    server.do.content = b"weighTs"
    code, _, err = run("get", "small.ckpt", "--from", server.address)
    assert code == 2
    assert "sha256" in err
    server.do.content = b"weights"
    assert run("get", "small.ckpt", "--from", server.address, "-o", ".")[:2] == (0, "small.ckpt\n")


@pytest.mark.parametrize(("plant", "part"), [(os.mkfifo, "a pipe"), (os.mkdir, "a folder"), (os.symlink, "exists")])
def test_get_does_not_open_what_is_no_file(run, published, plant, part):
    plant(*(["nowhere"] if plant is os.symlink else []), "unsized.ckpt")
    code, out, err = run("get", "unsized.ckpt", "-o", ".")
    assert (code, out) == (2, "")
    assert part in err


def test_get_puts_a_model_where_m_finds_it(run, server, published, tmp_path, monkeypatch):
    server.do.content = b"weights"
    monkeypatch.setenv("SD_MODELS", os.pathsep.join([str(tmp_path / "mine"), str(tmp_path / "shared")]))
    assert run("get", "SMALL", "--from", server.address)[:2] == (0, f"{tmp_path}/mine/small.ckpt\n")
    assert find(Path("small")) == tmp_path / "mine" / "small.ckpt"


def test_verify_says_right_and_wrong(run, published, monkeypatch):
    """By the hash, whatever the name; a cut file of a known name by its size alone."""
    files = {"small.ckpt": b"weights", "renamed.bin": b"weights", "other.bin": b"weighTs", "cut/small.ckpt": b"weigh"}
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    assert run("verify", "small.ckpt")[0] == 0
    code, out, _ = run("verify", *files)
    assert code == 1
    assert [line.partition(", ")[0] for line in out.splitlines()] == [
        "right   small.ckpt: small.ckpt",
        "right   renamed.bin: small.ckpt",
        "unknown other.bin is not one of the known checkpoints: a fine-tune",
        "WRONG   cut/small.ckpt has 5 bytes; small.ckpt has 7",
    ]
    code, out, _ = run("verify", "--json", *files)
    assert (code, [json.loads(line)["matches"] for line in out.splitlines()]) == (1, [True, True, False, False])
    Path("small.ckpt").write_bytes(b"weighTs")
    assert hash_of(b"weighTs") in verify(Path("small.ckpt")).problem
    code, out, err = run("verify", "small.ckpt", "missing.ckpt")
    assert (code, out) == (2, "")
    assert "missing.ckpt" in err
    published.pop()  # of the other one, the size is not known
    monkeypatch.setattr(known_module, "file_sha256", lambda path, **_: pytest.fail("read for nothing"))
    assert run("verify", "cut/small.ckpt")[0] == 1


def test_verify_reads_the_file_whatever_is_remembered(run, published):
    """Bytes changed in place, and a forged cache."""
    path = Path("small.ckpt")
    path.write_bytes(b"weights")
    assert run("verify", path)[0] == 0
    before = path.stat()
    path.write_bytes(b"weighTs")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    cache = cache_folder() / "sha256.json"
    cache.write_text(json.dumps({hashing._key(path.resolve(), path.stat()): hash_of(b"weights")}))
    assert hashing.file_sha256(path) == hash_of(b"weights")
    code, out, _ = run("verify", path)
    assert (code, out.split()[0]) == (1, "WRONG")


def test_the_token_of_the_environment_is_for_one_host(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert token_for("https://huggingface.co/x/y") == "secret"
    for address in ("http://huggingface.co/x", "https://huggingface.co.evil.com/x", "https://evilhuggingface.co/x"):
        assert token_for(address) is None
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    assert token_for("https://huggingface.co/x/y") is None
