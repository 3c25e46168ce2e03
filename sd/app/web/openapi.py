"""The description of our own API for programs: OpenAPI 3.1, written from the tables of routes and fields."""

from collections.abc import Mapping
from types import UnionType
from typing import get_args, get_origin

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sd import __version__
from sd.app.web.fields import BY_COMMAND, NUMBERS, PICTURES, PREPARED
from sd.app.web.limits import MOST_PICTURES
from sd.pipeline.image.input_settings import Expansion
from sd.pipeline.settings import FIELDS, RANGES

JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
PICTURE = {"type": "string", "contentEncoding": "base64", "description": "a picture in base64, or a data URL"}
ABOUT = {  # (method, path) -> what it is for, the schema of its body, and its answers beside errors
    ("GET", "/api/health"): ("Whether the server answers. Needs no token.", None, {200: "status and version"}),
    ("POST", "/api/jobs"): ("Queue a job.", "Job", {202: "its id, state and position"}),
    ("GET", "/api/jobs"): ("The latest jobs, the latest first.", None, {200: "each as GET /api/jobs/{id}"}),
    ("GET", "/api/jobs/{id}"): (
        "State, progress, messages and pictures of a job.",
        None,
        {200: "state is queued, running, done, failed or stopped"},
    ),
    ("GET", "/api/jobs/{id}/events"): (
        "Server-sent events: state, step, message, picture, and last done, failed or stopped. Last-Event-ID goes on.",
        None,
        {200: "a stream"},
    ),
    ("GET", "/api/jobs/{id}/page"): ("The page of a job that explains a picture.", None, {200: "HTML"}),
    ("POST", "/api/jobs/{id}/stop"): ("End a job at the next step; finished pictures are kept.", None, {202: "it"}),
    ("POST", "/api/jobs/{id}/skip"): ("Leave out the picture that is being made.", None, {202: "it"}),
    ("GET", "/pictures/{id}.png"): ("A picture by its sha256, as long as it is in memory.", None, {200: "PNG"}),
    ("GET", "/api/model"): ("The model in memory: its tasks, defaults, samplers, adapters.", None, {200: "facts"}),
    ("GET", "/api/models"): ("The models that a job can name.", None, {200: "name, sha256 and bytes of each"}),
    ("POST", "/api/tokens"): ("How a prompt is read.", "Prompt", {200: "tokens with weights, and chunks"}),
    ("POST", "/api/read"): ("The settings in a picture, whoever made it.", "Read", {200: "as fields of a job"}),
    ("POST", "/api/explain"): ("Make a page that shows how a picture was made.", "Explain", {202: "a job"}),
    ("GET", "/openapi.json"): ("This description.", None, {200: "OpenAPI 3.1"}),
}
ERRORS = {
    400: "a mistake in the request, in one sentence",
    401: "no token, or a wrong one",
    403: "another site's page, or a name that is not this server's",
    404: "there is nothing of that name",
    405: "another method",
    408: "the body did not come in time",
    409: "not in this state of the job",
    413: "too long",
    415: "another type than JSON",
    422: "a picture without settings",
    429: "too many wrong tokens",
    503: "the queue is full, or a model is being loaded",
}
BODIES = {
    "Prompt": {
        "required": ["text"],
        "properties": {
            "text": {"type": "string"},
            "steps": {"type": "integer", "minimum": 1, "maximum": 1000},
            "plain_prompts": {"type": "boolean"},
        },
        "additionalProperties": False,
    },
    "Read": {"required": ["picture"], "properties": {"picture": PICTURE}},
    "Explain": {
        "required": ["picture"],
        "properties": {"picture": {"type": "string"}, "attention": {"type": "boolean"}},
    },
}


async def openapi(request: Request) -> Response:
    return JSONResponse(description())


def description() -> dict[str, object]:
    """The whole document."""
    paths: dict[str, dict] = {}
    for (method, path), (summary, body, answers) in ABOUT.items():
        operation: dict[str, object] = {"summary": summary, "responses": responses(answers)}
        if "{id}" in path:
            operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
        if body:
            schema = {"$ref": f"#/components/schemas/{body}"}
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths.setdefault(path, {})[method.lower()] = operation
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
    schemas = {"Job": job_schema(), "Error": error}
    schemas |= {name: {"type": "object", **schema} for name, schema in BODIES.items()}
    security = {"bearer": {"type": "http", "scheme": "bearer"}, "basic": {"type": "http", "scheme": "basic"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "sd serve", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": security},
        "security": [{}, {"bearer": []}, {"basic": []}],
    }


def responses(answers: Mapping[int, str]) -> dict[str, object]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        **{str(status): {"description": text} for status, text in answers.items()},
        **{str(status): {"description": text, "content": content} for status, text in ERRORS.items()},
    }


def job_schema() -> dict[str, object]:
    """The fields of a job, with the types and ranges that the settings themselves have."""
    fields = {name: schema_of(name, kind) for name, kind in {**FIELDS, **PREPARED}.items()}
    fields |= dict.fromkeys(PICTURES, PICTURE)
    fields |= {name: {"type": "integer", "minimum": 1, "maximum": MOST_PICTURES} for name in NUMBERS}
    fields |= {
        "task": {"enum": list(BY_COMMAND)},
        "model": {"type": "string", "description": "a name or hash of GET /api/models"},
        "previews": {"type": "boolean"},
        "width": {"type": "integer", "minimum": 64, "maximum": 4096, "multipleOf": 8},
        "height": {"type": "integer", "minimum": 64, "maximum": 4096, "multipleOf": 8},
    }
    return {"type": "object", "required": ["prompt"], "properties": fields, "additionalProperties": False}


def schema_of(name: str, kind: type) -> dict[str, object]:
    """A setting's type, and its range where it is a number."""
    if isinstance(kind, UnionType):
        return {"anyOf": [schema_of(name, one) for one in get_args(kind)]}
    if get_origin(kind) is tuple:
        return {"type": "array", "items": schema_of("", get_args(kind)[0])}
    if kind is Expansion:
        return {"type": "string", "description": "left=128,right=64"}
    schema: dict[str, object] = {"type": JSON_TYPES[kind]}
    if name in RANGES and kind in (int, float):
        schema |= {"minimum": RANGES[name][0], "maximum": RANGES[name][1]}
    return schema


ROUTES = (("GET", "/openapi.json", openapi),)
