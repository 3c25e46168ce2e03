"""What all routes have in common: JSON in and out, errors as sentences, events as they come, work in threads."""

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial

import anyio
from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from convert.errors import CheckpointError
from sd.app.errors import UsageError
from sd.app.web.job import LAST, Event, Job
from sd.app.web.openai_fields import error_of
from sd.app.web.worker import BusyError, Worker
from sd.pipeline.errors import PictureError, SettingError

log = logging.getLogger(__name__)
PULSE = 15  # seconds after which a silent stream says that it lives, so that nothing between closes it
RETRY_AFTER = "5"  # seconds, when the queue is full
Handler = Callable[[Request], Awaitable[Response]]
ErrorBody = Callable[[int, str], object]  # from a status and a sentence to what a client is sent as JSON

ERROR_BODIES: dict[str, ErrorBody] = {  # by the beginning of a path; other APIs have other forms
    "/": lambda status, sentence: {"error": sentence},
    "/sdapi/": lambda status, sentence: {"error": sentence, "detail": sentence},
    "/v1/": lambda status, sentence: {"error": error_of(status, sentence)},
}


def worker_of(request: Request) -> Worker:
    return request.app.state.worker


async def json_body(request: Request) -> object:
    """The JSON of a request. Another type is refused: a page elsewhere can send text without being asked for."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"the body is {kind or 'of no type'}; send JSON, with Content-Type: application/json.")
    return parsed_json(await request.body())


def parsed_json(data: bytes) -> object:
    """Raises HTTPException 400 for what is no JSON, and for numbers and depths that Python cannot hold."""

    def no_number(text: str) -> object:
        raise ValueError(f"{text} is no number of JSON")

    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=no_number)
    except UnicodeDecodeError:
        raise HTTPException(400, "the body is not UTF-8 text.") from None
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {str(error)[:200]}.") from None


async def in_thread(work: Callable, *arguments: object, **options: object) -> object:
    """The result of work that takes time, or waits for a lock, while other requests are answered."""
    return await to_thread.run_sync(partial(work, *arguments, **options), abandon_on_cancel=False)


def job_named(request: Request) -> Job:
    """The job whose id is in the path. Raises HTTPException 404."""
    job = worker_of(request).find(request.path_params["id"])
    if job is None:
        raise HTTPException(404, "there is no job of this id; the latest ones are kept only.")
    return job


async def follow(job: Job, after: int = 0, pulse: float | None = PULSE) -> AsyncIterator[Event | None]:
    """Each event of a job after that number as it comes, up to the last.

    pulse  seconds after which None comes where no event does
    """
    from asyncio import get_running_loop

    loop, happened = get_running_loop(), anyio.Event()

    def tell() -> None:  # in the worker's thread
        def wake() -> None:
            happened.set()

        if not loop.is_closed():
            loop.call_soon_threadsafe(wake)

    stop_listening = job.listen(tell)
    try:
        while True:
            happened = anyio.Event()
            found = job.since(after)
            for event in found:
                yield event
                after = event.id
                if event.name in LAST:
                    return
            if found:
                continue
            with anyio.move_on_after(pulse) as waited:
                await happened.wait()
            if waited.cancelled_caught:
                yield None
    finally:
        stop_listening()


def event_stream(events: AsyncIterator[str]) -> StreamingResponse:
    """Server-sent events, from their text."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def as_sse(name: str, data: Mapping[str, object], id: int | None = None) -> str:
    """One server-sent event; the data are JSON in one line."""
    number = "" if id is None else f"id: {id}\n"
    return f"{number}event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


# Errors

USERS = (UsageError, SettingError, PictureError, CheckpointError)  # mistakes of whoever sent the request


def error_response(request: Request, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error in the form that the clients of this path know."""
    prefix = max((start for start in ERROR_BODIES if request.url.path.startswith(start)), key=len)
    return JSONResponse(ERROR_BODIES[prefix](status, sentence), status, headers=headers)


async def on_http_error(request: Request, error: HTTPException) -> Response:
    sentence = {404: "there is nothing at this address.", 405: "this address does not take this method."}
    plain = error.detail in ("Not Found", "Method Not Allowed")
    return error_response(
        request, error.status_code, sentence[error.status_code] if plain else error.detail, error.headers
    )


async def on_user_error(request: Request, error: Exception) -> Response:
    return error_response(request, 400, str(error))


async def on_busy(request: Request, error: BusyError) -> Response:
    return error_response(request, 503, str(error), {"Retry-After": RETRY_AFTER})


async def on_internal_error(request: Request, error: Exception) -> Response:
    return error_response(request, 500, f"internal error: {type(error).__name__}. The server's log says more.")


ERROR_HANDLERS = {
    HTTPException: on_http_error,
    **dict.fromkeys(USERS, on_user_error),
    BusyError: on_busy,
    Exception: on_internal_error,
}
