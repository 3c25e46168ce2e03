"""Our own API: jobs, their events and pictures, and what the model is."""

from collections.abc import AsyncIterator

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sd import __version__
from sd.app.web.fields import job_from
from sd.app.web.http import as_sse, event_stream, follow, in_thread, job_named, json_body, worker_of
from sd.app.web.job import Job
from sd.app.web.uploads import uploads
from sd.app.web.worker import Worker


async def health(request: Request) -> Response:
    return JSONResponse({"status": "ok", "version": __version__})


async def submit(request: Request) -> Response:
    given, worker = await json_body(request), worker_of(request)
    job = await in_thread(submitted, worker, given, request.app.state.spellings)
    facts = {"id": job.id, "state": job.state, "position": worker.position(job)}
    return JSONResponse(facts, 202, headers={"Location": f"/api/jobs/{job.id}"})


def submitted(worker: Worker, given: object, spellings: dict[str, str]) -> Job:
    """The job that a JSON object asks for. Takes a while: pictures and headers of files are read."""
    with uploads() as folder:
        job_request, previews = job_from(given, worker.models, folder, spellings)
        return worker.submit(job_request, previews=previews, folder=folder)


async def jobs(request: Request) -> Response:
    worker = worker_of(request)
    return JSONResponse({"jobs": [job.facts(worker.position(job)) for job in worker.latest()]})


async def job(request: Request) -> Response:
    found = job_named(request)
    return JSONResponse(found.facts(worker_of(request).position(found)))


async def events(request: Request) -> Response:
    found = job_named(request)
    after = request.headers.get("last-event-id", "0")
    if not (after.isascii() and after.isdecimal() and len(after) < 20):
        raise HTTPException(400, "Last-Event-ID is not the number of an event.")

    async def texts() -> AsyncIterator[str]:
        if after == "0":
            position = worker_of(request).position(found)
            yield as_sse("state", {"state": found.state, "position": position})
        async for event in follow(found, int(after)):
            yield ": \n\n" if event is None else as_sse(event.name, event.data, event.id)

    return event_stream(texts())


async def stop(request: Request) -> Response:
    found = job_named(request)
    found.stop()
    return JSONResponse(found.facts(), 202)


async def skip(request: Request) -> Response:
    found = job_named(request)
    if found.state != "running":
        raise HTTPException(409, f"the job is {found.state}, and makes no picture that could be skipped.")
    found.skip()
    return JSONResponse(found.facts(), 202)


async def picture(request: Request) -> Response:
    data = worker_of(request).memory.get(request.path_params["id"])
    if data is None:
        raise HTTPException(404, "this picture is not in memory, where the latest ones are. It is a file in --out.")
    return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=3600, immutable"})


async def models(request: Request) -> Response:
    worker = worker_of(request)
    rows = await in_thread(worker.models.listed)
    loaded = worker.loaded.request.file if worker.loaded else None
    files = worker.models.files()
    return JSONResponse({"models": [{**row, "loaded": files.get(row["name"]) == loaded} for row in rows]})


ROUTES = (
    ("GET", "/api/health", health),
    ("POST", "/api/jobs", submit),
    ("GET", "/api/jobs", jobs),
    ("GET", "/api/jobs/{id}", job),
    ("GET", "/api/jobs/{id}/events", events),
    ("POST", "/api/jobs/{id}/stop", stop),
    ("POST", "/api/jobs/{id}/skip", skip),
    ("GET", "/pictures/{id}.png", picture),
    ("GET", "/api/models", models),
)
