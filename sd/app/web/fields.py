"""From the JSON of our own API to a request: the fields of a line of --from-file, and what a command's flags say."""

from collections.abc import Mapping
from dataclasses import fields

from convert.errors import shown
from convert.families.table import TASKS
from sd.app.errors import UsageError
from sd.app.jobs.request import JobRequest, Line
from sd.app.jobs.tasks import USUAL
from sd.app.web.models import Models
from sd.app.web.uploads import Uploads
from sd.pipeline.errors import SettingError, nearest, shortened
from sd.pipeline.image.input_settings import Expansion, InputSettings
from sd.pipeline.settings import FIELDS, is_of_type

BY_COMMAND = {command: task for task, (command, _) in TASKS.items()}
PICTURES = {  # the fields that hold one, and the tasks that read it
    "init": ("img2img", "inpaint", "depth2img", "edit"),
    "mask": ("inpaint",),
    "depth": ("depth2img",),
}
NUMBERS = ("count", "batch_size")
PREPARED = {field.name: field.type for field in fields(InputSettings)}
OTHERS = ("task", "model", "previews", *PICTURES, *NUMBERS)
NAMES = sorted({*FIELDS, *PREPARED, *OTHERS})


def job_from(
    given: object, models: Models, uploads: Uploads, spellings: Mapping[str, str] | None = None
) -> tuple[JobRequest, bool]:
    """The request that a JSON object means, and whether it wants previews.

    uploads    gets the pictures that come with it
    spellings  further names of settings, -> ours

    Raises UsageError or SettingError: an unknown field is refused, as a mistyped one would else be dropped.
    """
    if not isinstance(given, dict):
        raise UsageError('a job is a JSON object, such as {"prompt": "a horse", "seed": 7}.')
    given = renamed(given, spellings or {})
    command = given.pop("task", "txt2img")
    if not isinstance(command, str) or command not in BY_COMMAND:
        raise UsageError(f"task {shortened(command)} {nearest(str(command), BY_COMMAND)}")
    model = given.pop("model", None)
    if model is not None and not isinstance(model, str):
        raise SettingError("model", f"cannot be {shortened(model)}; it is a name or a hash.")
    previews = given.pop("previews", True)
    if not isinstance(previews, bool):
        raise SettingError("previews", f"cannot be {shortened(previews)}; it is true or false.")
    return JobRequest(
        task=BY_COMMAND[command],
        model=models.find(model) if model else models.default,
        **numbers_of(given),
        **pictures_of(given, command, uploads),
        **prepared_of(given, command),
        **settings_of(given, command),
        out="",
    ), previews


def renamed(given: Mapping[str, object], spellings: Mapping[str, str]) -> dict[str, object]:
    """The fields by our names; null is the same as none. Raises UsageError for one that is unknown or comes twice."""
    found: dict[str, object] = {}
    for key, value in given.items():
        name = key if key in NAMES else spellings.get(key, key)
        if name not in NAMES:
            raise UsageError(f"{shown(key, 60)!r} {nearest(key, NAMES)}")
        if name in found:
            raise UsageError(f"{shown(key, 60)!r} sets {name} for the second time.")
        if value is not None:
            found[name] = value
    return found


def numbers_of(given: dict[str, object]) -> dict[str, int]:
    found = {name: given.pop(name) for name in NUMBERS if name in given}
    for name, value in found.items():
        if not is_of_type(value, int):
            raise SettingError(name, f"cannot be {shortened(value)}; it is of type int.")
    return found


def pictures_of(given: dict[str, object], command: str, uploads: Uploads) -> dict[str, object]:
    """The pictures that come with a request, as files."""
    found = {}
    for name, readers in PICTURES.items():
        if name in given and command not in readers:
            raise UsageError(f"{name} does nothing with the task {command}; it is for {' and '.join(readers)}.")
        if name in given:
            found[name] = uploads.add_text(name, given.pop(name))
    if command in PICTURES["init"] and "init" not in found:
        raise UsageError(f"the task {command} needs a picture to begin with: give it as init, in base64.")
    if command == "inpaint" and ("mask" in found) == ("expand" in given):
        raise UsageError('give either mask, whose white part is repainted, or expand, such as "left=128".')
    if command == "depth2img" and given.get("invert_depth") and "depth" not in found:
        raise UsageError("invert_depth is for a depth map of your own. Give one as depth, or leave it out.")
    return found


def prepared_of(given: dict[str, object], command: str) -> dict[str, InputSettings]:
    """How the pictures are prepared."""
    found = {name: given.pop(name) for name in PREPARED if name in given}
    if command == "txt2img":
        if found:
            raise UsageError(f"{next(iter(found))} does nothing without a picture to begin with.")
        return {}
    if "expand" in found:
        found["expand"] = Expansion.parse(found["expand"])
    return {"inputs": InputSettings(**found)}


def settings_of(given: dict[str, object], command: str) -> dict[str, object]:
    """The line of the prompt, and the other settings."""
    for name, value in given.items():
        if not is_of_type(value, FIELDS[name]):
            raise SettingError(name, f"cannot be {shortened(value)}.")
    if "prompt" not in given:
        raise UsageError('no "prompt" given.')
    prompt = given.pop("prompt")
    return {"lines": (Line({"prompt": prompt}),), "settings": {**USUAL[command], **given}}
