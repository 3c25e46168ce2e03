"""`sd show`: the settings in pictures, whoever made them."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from convert.errors import shown
from sd.app.cli import BAD_INPUT, say
from sd.app.cli.parser import Parser
from sd.app.jobs.stored import VAES, as_data, files_of, models_of, read

if TYPE_CHECKING:
    from sd.pipeline.image.stored_settings.web_ui import Found

NO_SETTINGS = 1  # exit code: the answer is no
FIRST = ("prompt", "negative_prompt", "steps", "sampler", "schedule", "guidance_scale", "seed", "width", "height")


def parser() -> Parser:
    parser = Parser(
        prog="sd show",
        description="Show how pictures were made: the settings that this program, the web UI, ComfyUI, InvokeAI,\n"
        "NovelAI, Fooocus and others store in PNG, JPEG, WebP, AVIF, GIF and TIFF files, under the\n"
        "names of our flags. Exit code 1 if a picture has none.",
        epilog="examples:\n  sd show picture.png\n  sd show *.png --json",
    )
    add = parser.add_argument
    add("pictures", nargs="+", type=Path, metavar="PICTURE", help="picture files")
    add("--raw", action="store_true", help="show all texts in the files, as they are")
    add("--json", action="store_true", help="print one JSON object per picture")
    return parser


def run(args: argparse.Namespace) -> int:
    from sd.pipeline.image.reading import PictureError
    from sd.pipeline.image.stored_settings.other_programs import NoSettings
    from sd.pipeline.image.stored_settings.settings_line import LONGEST_TEXT
    from sd.pipeline.image.stored_settings.texts import read_foreign_texts

    code = 0
    for number, path in enumerate(args.pictures):
        try:
            found, texts = read(path)
        except NoSettings as error:
            found, texts = None, read_foreign_texts(path) if args.raw else {}
            code = max(code, NO_SETTINGS)
            say(f"{path} {error}")
        except PictureError as error:
            code = BAD_INPUT
            say(str(error))
            continue
        texts = {name: text for name, text in texts.items() if name != "pixels"} if args.raw else {}
        if args.json:
            raw = {"texts": texts} if args.raw else {}
            print(json.dumps({"event": "settings", "path": str(path), **as_data(found), **raw}))
            continue
        lines = lines_about(found) if found else []
        lines += [line for name, text in texts.items() for line in (f"[{name}]", *text.split("\n"))]
        if len(args.pictures) > 1 and lines:
            lines.insert(0, f"{path}:")
        if number and lines:
            lines.insert(0, "")
        for line in lines:
            print(shown(line, LONGEST_TEXT))
    return code


def lines_about(found: "Found") -> list[str]:
    """A line for each setting, those that every picture has first."""
    settings = {name: found.settings[name] for name in (*FIRST, *found.settings) if name in found.settings}
    rows = {"program": found.program or "not said"}
    rows |= {name.replace("_", " "): value for name, value in settings.items() if says_something(name, value, found)}
    for name, facts in models_of(found).items():
        called = VAES.get(name, name)
        rows |= {called if fact == "name" else f"{called}'s {fact}": value for fact, value in facts.items()}
    for kind, noted in files_of(found).items():
        rows[kind] = [f"{name} ({(digest or 'no hash')[:12]})" for name, digest in noted]
    for name in ("init", "depth"):
        if isinstance(found.made_with.get(name), dict):
            rows[name] = found.made_with[name].get("name")
    if isinstance(rows.get("original size"), list | tuple):
        rows["original size"] = "x".join(map(str, rows["original size"]))
    lines = [f"{name + ':':<20} {value_text(value)}" for name, value in rows.items()]
    lines += [f"{'not usable here:':<20} {text}" for text in found.unused]
    return lines + [f"{'note:':<20} {text}" for text in found.notes]


def says_something(name: str, value: object, found: "Found") -> bool:
    """Whether a setting has a value. Pictures of ours have all settings: of most, the default says nothing."""
    from sd.pipeline.image.input_settings import InputSettings
    from sd.pipeline.image.stored_settings.web_ui import OURS
    from sd.pipeline.settings import Settings

    if value in ("", None, (), []) or value is False:
        return False
    if found.program != OURS or name in FIRST or (name.startswith("hires") and found.settings.get("hires")):
        return True
    return all(getattr(kind, name, None) != value for kind in (Settings, InputSettings))


def value_text(value: object) -> str:
    """A value in one line."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else " ".join(str(value).splitlines())
