"""The folder of `sd play`: page, scripts, the networks of the embedded model, and the runtime that computes them.

Everything in it is reached by relative addresses, and nothing outside of it is asked for. What takes long to get, the
runtime and the exported networks, is kept in the user's cache folder.
"""

import hashlib
import json
import shutil
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from convert.errors import size_text
from convert.files.hashing import file_sha256
from convert.files.own_files import make_private
from sd import __version__
from sd.app.errors import UsageError
from sd.app.jobs.extras import require
from sd.app.jobs.npm_package import Package, fetched, is_fetched
from sd.app.jobs.request import Events
from sd.files import cache_folder, embedded_model, folder_written_whole, remove_leftovers
from sd.text.tokenizer import MERGES_FILE

FACTS, FORMAT = "model.json", "sd-zoo-play"
TINY_VAE = "tiny-vae.safetensors"
NETWORKS = 5  # files
MODULES = ("sd.study.play.networks", "sd.runtime.onnx.export", "sd.runtime.onnx.graphs", "sd.runtime.onnx.graph_files")
ON_CPU = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
ON_GPU = ("ort.jspi.bundle.min.mjs", "ort-wasm-simd-threaded.jspi.wasm")
RUNTIME = Package(
    name="onnxruntime-web",
    version="1.30.0",
    size=33_106_585,
    sha512="q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    files={name: f"package/dist/{name}" for name in (*ON_CPU, *ON_GPU)},
)
NOTICE = f"""The files whose names begin with ort are from {RUNTIME.name} {RUNTIME.version}.
Copyright (c) Microsoft Corporation, MIT License: https://github.com/microsoft/onnxruntime/blob/main/LICENSE

clip_merges.bin is made from the vocabulary of OpenAI's CLIP. Copyright (c) 2021 OpenAI, MIT License.

All other files are part of sd-zoo, MIT License.
"""


def is_play(folder: Path) -> bool:
    """Whether `write_folder` wrote this folder."""
    try:
        return json.loads((folder / FACTS).read_text("utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def write_folder(folder: Path, events: Events, *, webgpu: bool = False) -> None:
    """Write the folder, in place of an older one.

    webgpu  with the runtime for GPUs, too, which a browser takes where it may use one

    Raises UsageError for a folder that holds something else, or where packages are missing; DownloadError where the
    runtime cannot be fetched; OSError.
    """
    if folder.exists() and not is_play(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not a folder of sd play, so it is kept. Give another one with -o.")
    if not folder.absolute().parent.is_dir():
        raise UsageError(f"the folder of {folder} does not exist. Make it first.")
    networks, runtime = exported_networks(events), fetched_runtime(events)
    with folder_written_whole(folder, force=True) as place:
        has_course = (folder.absolute().parent / "course" / "README.md").is_file()
        fill(place, networks, runtime, course=has_course, webgpu=webgpu)


def fill(place: Path, networks: Path, runtime: Path, *, course: bool, webgpu: bool) -> None:
    """Copy everything into an empty folder.

    course  the chapters lie beside the folder, so the page links them
    """
    from sd.study.play.page import TEMPLATE_FILE, index_page

    runtime_files = [runtime / name for name in (*ON_CPU, *(ON_GPU if webgpu else ()))]
    for source in (*TEMPLATE_FILE.parent.iterdir(), *runtime_files, *networks.rglob("*.onnx"), MERGES_FILE):
        shutil.copyfile(source, place / source.name)
    (place / "index.html").write_text(index_page(course="../course" if course else None), "utf-8")
    (place / "NOTICE.txt").write_text(NOTICE, "utf-8")
    loaded = {file.name: file.stat().st_size for file in place.iterdir() if file.suffix in (".onnx", ".wasm", ".bin")}
    facts = json.loads((networks / FACTS).read_text("utf-8"))
    about = {"format": FORMAT, "version": __version__, **facts, "files": dict(sorted(loaded.items()))}
    (place / FACTS).write_text(json.dumps(about, indent=1) + "\n", "utf-8")


def ready_folder() -> Path | None:
    """A folder that is there already: beside the docs of a checkout, or in the cache."""
    checkout = Path(__file__).parents[3] / "docs" / "play"
    return next((folder for folder in (checkout, cache_folder() / "play") if is_play(folder)), None)


def current_folder(events: Events, *, webgpu: bool = False) -> Path:
    """The folder in the cache, written anew; that only copies once runtime and networks are there."""
    folder = cache_folder() / "play"
    make_private(folder.parent)
    write_folder(folder, events, webgpu=webgpu)
    return folder


def fetched_runtime(events: Events) -> Path:
    """The folder with the runtime, which is downloaded the first time."""
    if is_fetched(RUNTIME):
        return fetched(RUNTIME)
    events.note(f"downloading {RUNTIME.name} {RUNTIME.version}, {size_text(RUNTIME.size)}")
    with events.stage("downloading", RUNTIME.size, "B") as advance:
        return fetched(RUNTIME, advance)


def exported_networks(events: Events) -> Path:
    """The folder with the networks, which are exported when the model or what exports them has changed."""
    models = embedded_model(), embedded_model().with_name(TINY_VAE)
    sources = [Path(find_spec(name).origin).read_bytes() for name in MODULES]
    parts = [file_sha256(path).encode() for path in models] + sources
    folder = cache_folder() / "play-networks" / hashlib.sha256(b"\n".join(parts)).hexdigest()[:16]
    if (folder / FACTS).is_file():
        return folder
    require("onnx", "sd play")
    make_private(folder.parent)
    events.note("exporting the networks of the small model for browsers, which takes a minute or two, once")
    from sd.study.play.networks import write_networks

    remove_leftovers([folder])
    with folder_written_whole(folder, force=True) as place, events.stage("exporting", NETWORKS, "network") as advance:
        config = write_networks(*models, place / "onnx", lambda _: advance(1))
        facts = {
            "name": models[0].stem,
            "size": config.native_size,
            "factor": config.vae.factor,
            "channels": config.vae.latent_channels,
            "latentScale": config.vae.latent_scale,
            "prediction": config.prediction,
            "guidance": config.guidance_scale,
            "schedule": asdict(config.schedule),
        }
        (place / FACTS).write_text(json.dumps(facts), "utf-8")
    for older in folder.parent.iterdir():
        if older != folder and not older.name.startswith("."):  # others may be writing what begins with a dot
            shutil.rmtree(older, ignore_errors=True)
    return folder
