"""The API of the common web UI, at /sdapi/v1, as its clients use it."""

import time
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from convert.families.table import TASKS, family_named
from sd.app.errors import UsageError
from sd.app.jobs.model import opened
from sd.app.jobs.model_folder import in_folders, stem_of
from sd.app.jobs.request import ModelRequest
from sd.app.web import a1111_extras, a1111_lists
from sd.app.web.a1111_fields import OPTIONS, Wanted, in_their_words, job_fields, model_named
from sd.app.web.a1111_info import info_text
from sd.app.web.a1111_lists import current_title
from sd.app.web.fields import job_from
from sd.app.web.formats import as_base64, png_of
from sd.app.web.http import error_response, follow, in_thread, json_body, worker_of
from sd.app.web.job import Job
from sd.app.web.uploads import uploads
from sd.app.web.worker import Worker
from sd.config import ModelConfig
from sd.pipeline.errors import SettingError

DEFAULT_OPTIONS = {  # as the web UI calls what is fixed here, or not set
    "samples_format": "png",
    "live_previews_enable": True,
    "live_previews_image_format": "jpeg",
    "CLIP_stop_at_last_layers": 1,
    "eta_noise_seed_delta": 0,
    "randn_source": "CPU",
    "token_merging_ratio": 0.0,
    "sd_vae": "Automatic",
}


async def txt2img(request: Request) -> Response:
    return await make(request, picture=False)


async def img2img(request: Request) -> Response:
    return await make(request, picture=True)


async def make(request: Request, *, picture: bool) -> Response:
    """Queue what is asked for, and answer when it is done; a client that goes away does not end it."""
    body, worker, begun = await object_of(request), worker_of(request), time.strftime("%Y%m%d%H%M%S")
    job, wanted = await in_thread(submitted, worker, body, options_of(request), picture=picture)
    async for _ in follow(job):
        continue
    if job.state == "failed":
        return error_response(request, 500, job.error)
    send = body.get("send_images", True)
    images = await in_thread(lambda: [as_base64(png_of(worker, each)) for each in job.pictures] if send else [])
    infotexts = [each.infotext for each in job.pictures]
    echo = {name: value for name, value in body.items() if name not in ("init_images", "mask")}
    info = info_text(infotexts, wanted, job.messages, begun)
    return JSONResponse({"images": images, "parameters": echo, "info": info})


def submitted(worker: Worker, body: dict, options: dict, *, picture: bool) -> tuple[Job, Wanted]:
    """The job that a request asks for, and how it was understood."""
    name = model_named(body, options)
    model = worker.models.find(name) if name else worker.models.default
    tasks = [TASKS[task][0] for task in family_named(config_of(worker, model).family).tasks]
    try:
        wanted = job_fields(body, picture=picture, tasks=tasks, options=options)
        fields = dict(wanted.fields)
        parts = {part: fields.pop(part) for part in ("vae", "refiner") if part in fields}
        with uploads() as folder:
            job_request, _ = job_from(fields, worker.models, folder)
            job_request = replace(job_request, model=with_parts(job_request.model, worker, **parts))
            return worker.submit(job_request, folder=folder), wanted
    except SettingError as error:
        raise UsageError(in_their_words(error)) from None


def config_of(worker: Worker, model: ModelRequest) -> ModelConfig:
    """What kind of model a request names: the one in memory, or the header of its file."""
    if worker.loaded and worker.loaded.request == model:
        return worker.loaded.checkpoint.config
    with opened(model, None) as (checkpoint, _):
        return checkpoint.config


def with_parts(model: ModelRequest, worker: Worker, vae: str = "", refiner: str = "") -> ModelRequest:
    """The model with another VAE and a refiner, each the name of a file in a folder of such, never a path."""
    if vae:
        files = in_folders("vae")
        found = [path for name, path in files.items() if vae in (name, path.name) or stem_of(vae) == stem_of(name)]
        if not found:
            there = f"There are: {', '.join(files)}." if files else "The folder of VAEs is empty."
            raise UsageError(f"the VAE {vae[:60]} does not exist. {there}")
        model = replace(model, vae=found[0])
    return replace(model, refiner=worker.models.find(refiner).file) if refiner else model


# Progress


async def progress(request: Request) -> Response:
    worker = worker_of(request)
    job, skip = worker.current, request.query_params.get("skip_current_image", "").lower() == "true"
    waiting = sum(not each.over for each in worker.latest())
    state: dict[str, Any] = {"skipped": False, "interrupted": False, "stopping_generation": False, "job": ""}
    state |= {"job_count": waiting, "job_no": 0, "job_timestamp": "0", "sampling_step": 0, "sampling_steps": 0}
    answer = {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
    if job is None or job.over:
        return JSONResponse(answer)
    state |= {"job": TASKS[job.request.task][0], "job_no": job.picture, "sampling_step": job.picture_step}
    state["sampling_steps"] = job.picture_steps
    state["job_timestamp"] = time.strftime("%Y%m%d%H%M%S", time.localtime(job.made))
    answer["progress"] = max(0.01, min(job.step / job.steps, 0.99)) if job.steps else 0.01  # 0 means idle
    answer["eta_relative"] = job.seconds_left or 0.0
    answer["current_image"] = job.preview.partition(",")[2] if job.preview and not skip else None
    answer["textinfo"] = job.messages[-1]["text"] if job.messages else None
    answer["current_task"] = job.id
    return JSONResponse(answer)


async def interrupt(request: Request) -> Response:
    if job := worker_of(request).current:
        job.stop()
    return JSONResponse({})


async def skip(request: Request) -> Response:
    if job := worker_of(request).current:
        job.skip()
    return JSONResponse({})


# Options


def options_of(request: Request) -> dict[str, object]:
    """Those that clients have set, which hold until the server ends."""
    state = request.app.state
    if not hasattr(state, "web_ui_options"):
        state.web_ui_options = {}
    return state.web_ui_options


async def get_options(request: Request) -> Response:
    options = {**DEFAULT_OPTIONS, **options_of(request)}
    options["sd_model_checkpoint"] = await in_thread(
        current_title, worker_of(request), options.get("sd_model_checkpoint")
    )
    options["sd_checkpoint_hash"] = options["sd_model_checkpoint"].removesuffix("]").rpartition(" [")[2]
    return JSONResponse(options)


async def set_options(request: Request) -> Response:
    """Options hold for later requests, whose own take precedence. A model is loaded with the next of them."""
    given = await object_of(request)
    if name := given.get("sd_model_checkpoint"):
        await in_thread(worker_of(request).models.find, str(name))
    known = {name: value for name, value in given.items() if name in OPTIONS}
    job_fields({}, picture=False, tasks=(), options=known)  # raises for what they cannot be
    options_of(request).update(known)
    ignored = sorted(given.keys() - known.keys() - DEFAULT_OPTIONS.keys())
    return JSONResponse({"ignored": ignored} if ignored else {})


async def object_of(request: Request) -> dict[str, object]:
    """The JSON object of a request."""
    body = await json_body(request)
    if not isinstance(body, dict):
        raise UsageError('the body must be a JSON object, such as {"prompt": "a horse", "steps": 20}.')
    return body


ROUTES = (
    ("POST", "/sdapi/v1/txt2img", txt2img),
    ("POST", "/sdapi/v1/img2img", img2img),
    ("GET", "/sdapi/v1/progress", progress),
    ("POST", "/sdapi/v1/interrupt", interrupt),
    ("POST", "/sdapi/v1/skip", skip),
    ("GET", "/sdapi/v1/options", get_options),
    ("POST", "/sdapi/v1/options", set_options),
    *a1111_lists.ROUTES,
    *a1111_extras.ROUTES,
)
