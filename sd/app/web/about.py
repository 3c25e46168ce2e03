"""What a client wants to know: the model and its defaults, how a prompt is read, how a picture was made."""

from dataclasses import replace

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from convert.families.few_steps import usual_settings
from convert.families.table import TASKS, family_named
from sd.app.errors import UsageError
from sd.app.jobs.adapter_folder import known_adapters
from sd.app.jobs.embeddings import known_words
from sd.app.jobs.request import Events
from sd.app.jobs.settings_again import FIRST
from sd.app.jobs.stored import as_data, read
from sd.app.jobs.tasks import USUAL
from sd.app.jobs.tokens import texts_of
from sd.app.web.fields import NAMES
from sd.app.web.http import in_thread, job_named, json_body, worker_of
from sd.app.web.job import Job, Picture
from sd.app.web.job_events import JobEvents
from sd.app.web.limits import MOST_PICTURE_BYTES
from sd.app.web.uploads import decoded, uploads
from sd.app.web.worker import Worker
from sd.pipeline.image.input_settings import RESIZE_NAMES
from sd.pipeline.image.stored_settings.other_programs import NoSettings
from sd.pipeline.settings import DEFAULT_STEPS, Settings, require_type
from sd.sampling.names import SAMPLER_INFO, SCHEDULES

PAGE_RULES = "sandbox allow-scripts; default-src 'none'; img-src data:; "  # the page has no business with this server
PAGE_RULES += "script-src 'unsafe-inline'; style-src 'unsafe-inline'"


class Warnings(Events):
    """Keeps what is warned of."""

    def __init__(self):
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


async def model(request: Request) -> Response:
    return JSONResponse(await in_thread(model_facts, worker_of(request)))


def model_facts(worker: Worker) -> dict[str, object]:
    """What the model in memory is, and what settings it is used with."""
    loaded = worker.loaded
    if loaded is None:
        raise HTTPException(503, "a model is being loaded. Try again soon.", {"Retry-After": "2"})
    config = loaded.checkpoint.config
    family, native = family_named(config.family), config.native_size
    begins = loaded.checkpoint.said.begins_at_noise
    usual = {"zero_terminal_snr": begins, **usual_settings(config)}
    settings = Settings(prompt="", seed=0, width=native, height=native, **usual).to_dict()
    return {
        "name": loaded.request.file.name,
        "family": config.family,
        "sha256": loaded.model.source.sha256(),
        "native_size": native,
        "sizes": {"multiple": 8},
        "tasks": [TASKS[task][0] for task in family.tasks],
        "defaults": {name: settings[name] for name in (*FIRST, "zero_terminal_snr") if name not in ("prompt", "seed")},
        "defaults_of_tasks": {TASKS[task][0]: USUAL[TASKS[task][0]] for task in family.tasks},
        "samplers": [
            {"name": name, "label": row.label, "schedule": row.schedule} for name, row in SAMPLER_INFO.items()
        ],
        "schedules": [{"name": name, "label": row[0]} for name, row in SCHEDULES.items()],
        "resize_modes": list(RESIZE_NAMES),
        "adapters": [name.rpartition(".")[0] or name for name in known_adapters()],
        "embeddings": known_words(loaded.request),
        "tiny_vae": loaded.model.tiny_vae is not None,
        "precision": {part: str(dtype).removeprefix("torch.") for part, dtype in loaded.model.dtypes.items()},
        "device": loaded.model.device.type,
    }


async def tokens(request: Request) -> Response:
    given = await json_body(request)
    if not isinstance(given, dict) or not isinstance(given.get("text"), str):
        raise UsageError('give the prompt as {"text": "..."}.')
    if unknown := given.keys() - {"text", "steps", "plain_prompts"}:
        raise UsageError(f"{min(unknown)[:60]!r} does not exist. There are: text, steps, plain_prompts.")
    steps, plain = given.get("steps", DEFAULT_STEPS), given.get("plain_prompts", False)
    require_type("steps", steps, int, "int")
    require_type("plain_prompts", plain, bool, "bool")
    return JSONResponse(await in_thread(token_facts, worker_of(request), given["text"], steps, plain))


def token_facts(worker: Worker, text: str, steps: int, plain: bool) -> dict[str, object]:
    """How a prompt is read: the tokens of its first text in a row, and all that `sd tokens --json` tells."""
    warnings = Warnings()
    request = worker.loaded.request if worker.loaded else worker.models.default
    job, texts = texts_of(text, request, warnings, steps=steps, plain=plain)
    row = [
        {**token, "chunk": number} for number, chunk in enumerate(texts[0]["chunks"], 1) for token in chunk["tokens"]
    ]
    return {
        "tokens": row,
        "chunks": len(texts[0]["chunks"]),
        "room": len(texts[0]["chunks"][0]["ids"]) - 2,
        "beyond": sum(token["chunk"] > 1 for token in row),
        "texts": texts,
        "lora": [use.as_flag for use in job.adapters],
        "warnings": warnings.texts,
    }


async def settings(request: Request) -> Response:
    """The settings in a picture, which is the body itself, or base64 in JSON."""
    if request.headers.get("content-type", "").startswith("application/json"):
        given = await json_body(request)
        data = decoded("picture", given.get("picture") if isinstance(given, dict) else None)
    else:
        data = await request.body()
    if len(data) > MOST_PICTURE_BYTES:
        raise HTTPException(413, f"a picture has at most {MOST_PICTURE_BYTES >> 20} MB.")
    if not data:
        raise UsageError("the body is empty. Send a picture.")
    return JSONResponse(await in_thread(settings_in, data))


def settings_in(data: bytes) -> dict[str, object]:
    """What a picture says: as `sd show --json` does, and as fields of a job."""
    with uploads() as folder:
        try:
            found, texts = read(folder.add("picture", data))
        except NoSettings as error:
            raise HTTPException(422, f"the picture {error}") from None
        folder.cleanup()
    fields = {name: value for name, value in found.settings.items() if name in NAMES}
    return {**as_data(found), "fields": fields, "infotext": texts.get("parameters")}


async def explain(request: Request) -> Response:
    given = await json_body(request)
    sha256 = given.get("picture") if isinstance(given, dict) else None
    if not isinstance(sha256, str):
        raise UsageError('give the sha256 of a finished picture as {"picture": "..."}.')
    attention = given.get("attention", True)
    require_type("attention", attention, bool, "bool")
    job = await in_thread(explained, worker_of(request), sha256, attention)
    return JSONResponse(job.facts(worker_of(request).position(job)), 202, headers={"Location": f"/api/jobs/{job.id}"})


def explained(worker: Worker, sha256: str, attention: bool) -> Job:
    """The job that makes the page of a picture. Raises HTTPException."""
    sha256 = sha256.removeprefix("/pictures/").removesuffix(".png")
    made, picture = made_by(worker, sha256)
    if made.request.init is not None:
        raise HTTPException(409, "only pictures from text alone are explained here; sd explain --init does the others.")
    again = {name: value for name, value in picture.settings.items() if name not in ("task", "prompt")}
    line = replace(made.request.lines[0], settings={"prompt": picture.settings["prompt"]})
    request = replace(made.request, lines=(line,), settings=again, count=1, batch_size=1)

    def work(job: Job) -> None:
        from sd.app.jobs.explaining import make_page
        from sd.app.jobs.model import teach_words

        loaded, events = worker.use(job), JobEvents(job, (), worker.memory)
        run = worker.plan(job.request, events)
        teach_words(loaded.model, run.learned)
        _, page = make_page(loaded.model, run.jobs[0], [], run.adapters, events, attention=attention)
        worker.pages.keep(job.id, page)
        job.page = True

    return worker.submit(request, work=work, previews=False)


def made_by(worker: Worker, sha256: str) -> tuple[Job, Picture]:
    """A finished picture, and the job that made it. Raises HTTPException 404."""
    for job in worker.latest():
        for picture in job.pictures:
            if picture.sha256 == sha256:
                return job, picture
    raise HTTPException(404, "this picture is not among those of the latest jobs.")


async def page(request: Request) -> Response:
    job = job_named(request)
    data = worker_of(request).pages.get(job.id)
    if data is None:
        raise HTTPException(404, "this job has no page, or no longer.")
    return Response(data, media_type="text/html", headers={"Content-Security-Policy": PAGE_RULES})


ROUTES = (
    ("GET", "/api/model", model),
    ("POST", "/api/tokens", tokens),
    ("POST", "/api/read", settings),
    ("POST", "/api/explain", explain),
    ("GET", "/api/jobs/{id}/page", page),
)
