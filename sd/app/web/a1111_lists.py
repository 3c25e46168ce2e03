"""What the web UI's API lists: samplers, models, adapters and so on, in the form that its clients read."""

import os
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from convert.files.hashing import remembered, remembered_sha256
from sd.app.jobs.model_folder import in_folders, stem_of
from sd.app.web.http import in_thread, worker_of
from sd.app.web.worker import Worker
from sd.sampling.names import SAMPLER_INFO, SCHEDULES, meaning, schedule_name

NOTHING = (  # lists of what does not exist here
    *("hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles", "artist-categories", "artists"),
    *("script-info", "extensions"),
)
UPSCALERS = ("None", "Lanczos", "Nearest")


def samplers() -> list[dict[str, object]]:
    """Each under a name that means it: the web UI's where it means the same."""
    return [
        {
            "name": row.label if (meaning(row.label) or ("",))[0] == name else name,
            "aliases": [name, *row.spellings.split()],
            "options": {"scheduler": row.schedule},
        }
        for name, row in SAMPLER_INFO.items()
    ]


def schedulers() -> list[dict[str, object]]:
    rows = [{"name": "automatic", "label": "Automatic", "aliases": None}]
    for name, (label, spellings) in SCHEDULES.items():
        label = label if schedule_name(label) == name else name
        rows.append({"name": name, "label": label, "aliases": spellings.split() or None})
    return [{**row, "default_rho": -1, "need_inner_model": False} for row in rows]


def title_of(path: Path, sha256: str | None) -> str:
    """ "model.safetensors [6ce0161689]"; without the hash until it is known."""
    return f"{path.name} [{sha256[:10]}]" if sha256 else path.name


def models(worker: Worker) -> list[dict[str, object]]:
    """Files are named by their path from the folder of models, not by where that is."""
    return [
        {
            "title": title_of(Path(row["name"]), row["sha256"]),
            "model_name": stem_of(Path(row["name"]).name),
            "hash": row["sha256"] and row["sha256"][:10],
            "sha256": row["sha256"],
            "filename": row["name"],
            "config": None,
        }
        for row in worker.models.listed()
    ]


def current_title(worker: Worker, chosen: str | None) -> str:
    """The title of the model that a request without one uses."""
    path = (worker.models.find(chosen) if chosen else worker.models.default).file
    return title_of(path, remembered_sha256(path, remembered()) if path.is_file() else None)


def vaes() -> list[dict[str, str]]:
    return [{"model_name": Path(name).name, "filename": name} for name in in_folders("vae")]


def loras() -> list[dict[str, object]]:
    stems = {name: Path(name).stem for name in in_folders("loras")}
    return [{"name": stem, "alias": stem, "path": name, "metadata": {}} for name, stem in stems.items()]


def embeddings() -> dict[str, dict]:
    unknown = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": None, "vectors": None}
    return {"loaded": {Path(name).stem: unknown for name in in_folders("embeddings")}, "skipped": {}}


def upscalers() -> list[dict[str, object]]:
    rest = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
    return [{"name": name, **rest} for name in UPSCALERS]


def memory() -> dict[str, dict]:
    """In bytes: of the machine and this process, and of the GPU."""
    import torch

    ram: dict[str, object] = {"error": "unavailable"}
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        total, free = (os.sysconf("SC_PAGE_SIZE") * os.sysconf(f"SC_{name}_PAGES") for name in ("PHYS", "AVPHYS"))
        ram = {"free": free, "used": total - free, "total": total}

    if not torch.cuda.is_available():
        return {"ram": ram, "cuda": {"error": "unavailable"}}
    free, total = torch.cuda.mem_get_info()
    system = {"free": free, "used": total - free, "total": total}
    return {"ram": ram, "cuda": {"system": system}}


def listing(make):
    """A handler that answers with what a function lists."""

    async def answer(request: Request) -> Response:
        return JSONResponse(await in_thread(make))

    return answer


async def list_models(request: Request) -> Response:
    return JSONResponse(await in_thread(models, worker_of(request)))


async def refreshed(request: Request) -> Response:
    return JSONResponse({})  # folders are looked at each time


ROUTES = (
    *(("GET", f"/sdapi/v1/{name}", listing(list)) for name in NOTHING),
    ("GET", "/sdapi/v1/samplers", listing(samplers)),
    ("GET", "/sdapi/v1/schedulers", listing(schedulers)),
    ("GET", "/sdapi/v1/sd-models", list_models),
    ("GET", "/sdapi/v1/sd-vae", listing(vaes)),
    ("GET", "/sdapi/v1/loras", listing(loras)),
    ("GET", "/sdapi/v1/embeddings", listing(embeddings)),
    ("GET", "/sdapi/v1/upscalers", listing(upscalers)),
    ("GET", "/sdapi/v1/latent-upscale-modes", listing(lambda: [{"name": "Latent"}])),
    ("GET", "/sdapi/v1/memory", listing(memory)),
    ("GET", "/sdapi/v1/cmd-flags", listing(lambda: {"api": True, "listen": False})),
    ("GET", "/sdapi/v1/scripts", listing(lambda: {"txt2img": [], "img2img": []})),
    *(("POST", f"/sdapi/v1/refresh-{kind}", refreshed) for kind in ("checkpoints", "vae", "loras", "embeddings")),
)
