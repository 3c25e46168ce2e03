"""OpenAI's images API, at /v1: generations, edits, variations, models, and streams of previews."""

import time
from collections.abc import AsyncIterator, Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from convert.families.few_steps import usual_settings
from sd.app.errors import UsageError
from sd.app.web.a1111 import config_of
from sd.app.web.fields import job_from
from sd.app.web.formats import MIME, as_base64, in_format, png_of, preview_in_format
from sd.app.web.http import USERS, as_sse, event_stream, follow, in_thread, json_body, worker_of
from sd.app.web.job import Job, Picture
from sd.app.web.openai_fields import FieldError, Wanted, error_of, wanted_from
from sd.app.web.openai_pictures import Given, add_pictures
from sd.app.web.uploads import uploads
from sd.app.web.worker import BusyError, Worker
from sd.pipeline.errors import SettingError
from sd.pipeline.settings import DEFAULT_STEPS

THEIRS = (
    "dall-e",
    "gpt-image",
    "chatgpt-image",
    "sd-cpp-local",
)  # how names begin that clients send as a matter of course
PARAMS = {"width": "size", "height": "size", "count": "n", "init": "image"}  # our names -> theirs
NO_USAGE = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0}
NO_USAGE |= {"input_tokens_details": {"text_tokens": 0, "image_tokens": 0}}


async def generations(request: Request) -> Response:
    body = await json_body(request)
    if not isinstance(body, dict):
        raise HTTPException(400, 'the body must be a JSON object, such as {"prompt": "a horse"}.')
    return await made(request, "image_generation", body)


async def edits(request: Request) -> Response:
    return await made(request, "image_edit", *await form_of(request))


async def variations(request: Request) -> Response:
    fields, files = await form_of(request)
    return await made(request, "image_edit", {"prompt": None, **fields}, files)


async def form_of(request: Request) -> tuple[dict[str, object], list[Given]]:
    """The texts of a form, and its files."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise HTTPException(415, "pictures come as a form: send multipart/form-data, with a file named image.")
    async with request.form(max_files=20, max_fields=100) as form:
        rows = form.multi_items()
        files = [
            Given(name.removesuffix("[]"), await value.read()) for name, value in rows if not isinstance(value, str)
        ]
        return {name: value for name, value in rows if isinstance(value, str)}, files


async def made(request: Request, kind: str, body: Mapping[str, object], files: list[Given] = ()) -> Response:
    """Queue what is asked for; answer when it is done, or with a stream. Who goes away no longer wants it.

    kind  of the events in a stream
    """
    worker = worker_of(request)
    try:
        job, wanted = await in_thread(submitted, worker, body, files, from_picture=kind == "image_edit")
    except USERS as error:
        return problem(400, str(error), error)
    except BusyError as error:
        return problem(503, str(error))
    if wanted.stream:
        return event_stream(events_of(worker, job, wanted, kind, str(request.base_url)))
    async for event in follow(job, pulse=1):
        if event is None and await request.is_disconnected():
            job.stop()
    if job.state == "failed":
        return problem(500, job.error)
    if job.state == "stopped" and not job.pictures:
        return problem(503, "the job was stopped before its first picture was finished.")
    return JSONResponse(await in_thread(reply, worker, job, wanted, str(request.base_url)))


def submitted(
    worker: Worker, body: Mapping[str, object], files: list[Given], *, from_picture: bool
) -> tuple[Job, Wanted]:
    """The job that a request asks for, and how its pictures are sent."""
    model = worker.models.default
    if (name := body.get("model")) and not str(name).startswith(THEIRS):
        try:
            model = worker.models.find(str(name))
        except UsageError as error:
            raise FieldError("model", str(error), whole=True) from None
    config = config_of(worker, model)
    wanted = wanted_from(body, steps=usual_settings(config).get("steps", DEFAULT_STEPS))
    if "prompt" not in body:
        raise FieldError("prompt", "is missing: say what to show.")
    fields = wanted.fields
    with uploads() as folder:
        if from_picture:
            add_pictures(fields, files, config, folder)
        elif files:
            raise FieldError(files[0].name, "does nothing here; pictures go to /v1/images/edits.")
        job_request, _ = job_from({**fields, "model": model.file.name if name else None}, worker.models, folder)
        return worker.submit(job_request, folder=folder, previews=wanted.partial_images > 0), wanted


def reply(worker: Worker, job: Job, wanted: Wanted, base: str) -> dict[str, object]:
    """The body of an answer with all pictures of a job."""
    return {
        "created": int(job.made),
        "data": [sent(worker, picture, wanted, base) for picture in job.pictures],
        **how_made(wanted, job.pictures[0]),
        "usage": NO_USAGE,
        "messages": [message["text"] for message in job.messages],
        "ignored": wanted.ignored,
    }


def sent(worker: Worker, picture: Picture, wanted: Wanted, base: str) -> dict[str, object]:
    """One picture: its bytes, its address for as long as it is in memory, or both, and how it was made."""
    row: dict[str, object] = {"seed": picture.seed, "settings": picture.settings, "infotext": picture.infotext}
    if wanted.response_format != "url":
        data = in_format(png_of(worker, picture), wanted.output_format, wanted.output_compression, picture.infotext)
        row["b64_json"] = as_base64(data)
    if wanted.response_format != "b64_json":
        place = picture.url if wanted.output_format == "png" else f"/v1/images/{picture.sha256}.{wanted.output_format}"
        row["url"] = base.rstrip("/") + place
    return row


def how_made(wanted: Wanted, picture: Picture) -> dict[str, object]:
    return {
        "size": f"{picture.width}x{picture.height}",
        "quality": wanted.quality,
        "output_format": wanted.output_format,
        "background": "opaque",
    }


async def events_of(worker: Worker, job: Job, wanted: Wanted, kind: str, base: str) -> AsyncIterator[str]:
    """The stream of a job: previews, as evenly spread over the steps as they come, and each finished picture."""
    previews: list[tuple[int, int, str]] = []  # number of the picture, number of the preview, data URL
    seen = {"picture": -1, "index": 0, "preview": None}

    def note_preview() -> None:  # in the worker's thread, since a step's event gives way to the next one
        if job.picture != seen["picture"]:
            seen.update(picture=job.picture, index=0)
        due = job.picture_steps * (seen["index"] + 1) / (wanted.partial_images + 1)
        new = job.preview is not None and job.preview is not seen["preview"]
        if new and seen["index"] < wanted.partial_images and job.picture_step >= due:
            previews.append((job.picture, seen["index"], job.preview))
            seen.update(index=seen["index"] + 1, preview=job.preview)

    end_listening, done = job.listen(note_preview), 0
    try:
        async for event in follow(job):
            while previews:
                _, index, url = previews.pop(0)
                yield await in_thread(partial_image, job, wanted, kind, index, url)
            for picture in job.pictures[done:]:
                yield await in_thread(completed, worker, job, wanted, kind, picture, base)
                done += 1
            if event is None:
                yield ": \n\n"
        if job.state == "failed":
            yield as_sse("error", {"type": "error", "error": error_of(500, job.error)})
        yield "data: [DONE]\n\n"
    finally:
        end_listening()
        if not job.over:  # the client has gone
            job.stop()


def partial_image(job: Job, wanted: Wanted, kind: str, index: int, url: str) -> str:
    width, height = job.request.settings.get("width", 0), job.request.settings.get("height", 0)
    data, size = preview_in_format(url, wanted.output_format, (width, height) if width and height else None)
    facts = {"size": f"{size[0]}x{size[1]}", "quality": wanted.quality, "background": "opaque"}
    facts |= {"output_format": wanted.output_format, "created_at": int(time.time()), "partial_image_index": index}
    name = f"{kind}.partial_image"
    return as_sse(name, {"type": name, "b64_json": as_base64(data), **facts})


def completed(worker: Worker, job: Job, wanted: Wanted, kind: str, picture: Picture, base: str) -> str:
    name = f"{kind}.completed"
    row = sent(worker, picture, wanted, base)
    facts = {**how_made(wanted, picture), "created_at": int(time.time()), "usage": NO_USAGE}
    return as_sse(name, {"type": name, **row, **facts})


# Errors


def problem(status: int, sentence: str, error: Exception | None = None) -> Response:
    """An error, with the field that is to blame where it is known."""
    name = error.field if isinstance(error, FieldError) else getattr(error, "name", None)
    param = PARAMS.get(name, name)
    if isinstance(error, SettingError) and param != name:
        sentence = f"{param}: {sentence}"
    if param == "model":
        return JSONResponse({"error": error_of(404, sentence, param, "model_not_found")}, 404)
    headers = {"Retry-After": "5"} if status == 503 else None
    return JSONResponse({"error": error_of(status, sentence, param)}, status, headers=headers)


# Models and pictures


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": await in_thread(model_rows, worker_of(request))})


async def model(request: Request) -> Response:
    rows = await in_thread(model_rows, worker_of(request))
    found = next((row for row in rows if row["id"] == request.path_params["id"]), None)
    if found is None:
        raise HTTPException(404, f"there is no such model. There are: {', '.join(row['id'] for row in rows)}.")
    return JSONResponse(found)


def model_rows(worker: Worker) -> list[dict[str, object]]:
    files = worker.models.files()
    return [
        {"id": name, "object": "model", "created": int(path.stat().st_mtime), "owned_by": "sd-zoo"}
        for name, path in files.items()
    ]


async def file(request: Request) -> Response:
    """A picture that is still in memory, in another format."""
    data, kind = worker_of(request).memory.get(request.path_params["id"]), request.path_params["format"]
    if data is None or kind not in MIME:
        raise HTTPException(404, "this picture is not in memory, where only the latest ones are.")
    return Response(await in_thread(in_format, data, kind), media_type=MIME[kind], headers={"Cache-Control": "private"})


async def allowed(request: Request) -> Response:
    """For clients that ask with OPTIONS whether there is such a route."""
    return Response(status_code=204, headers={"Allow": "POST, OPTIONS"})


IMAGES = {"/v1/images/generations": generations, "/v1/images/edits": edits, "/v1/images/variations": variations}
ROUTES = (
    *(("POST", path, handler) for path, handler in IMAGES.items()),
    *(("OPTIONS", path, allowed) for path in IMAGES),
    ("GET", "/v1/models", models),
    ("GET", "/v1/models/{id:path}", model),
    ("GET", "/v1/images/{id}.{format}", file),
)
