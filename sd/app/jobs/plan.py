"""What pictures to make: the command line's flags, and the lines of a prompt file, as settings."""

import argparse
import json
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sd.app.errors import UsageError
from sd.pipeline.second_pass import first_size
from sd.pipeline.settings import FIELDS, SettingError, Settings, is_of_type, nearest


@dataclass(frozen=True)
class Line:
    """One prompt with the settings that it has of its own."""

    where: str  # "jobs.txt, line 3: ", or nothing for the command line itself
    own: dict


def read_lines(args: argparse.Namespace, spellings: dict[str, str]) -> list[Line]:
    """The prompt of the command line, or those of the prompt file.

    spellings  every spelling of a flag, without its hyphens -> the setting that it sets
    """
    given = (args.prompt, args.prompt_flag, args.prompt_file, args.from_file)
    sources = [source for source in given if source is not None]
    if len(sources) != 1:
        flags = "PROMPT, --prompt, --prompt-file and --from-file"
        problem = "no prompt given" if not sources else f"more than one of {flags} given"
        raise UsageError(f'{problem}. Example: sd txt2img "a horse" -m model.ckpt.')
    if args.prompt_file is not None:
        return [Line("", {"prompt": read_prompt(args.prompt_file)})]
    if args.from_file is None:
        return [Line("", {"prompt": sources[0]})]
    lines = []
    for number, line in enumerate(read_text("--from-file", args.from_file).split("\n"), 1):
        where = f"{shown_source(args.from_file)}, line {number}: "
        line = line.strip()
        if line:
            lines.append(Line(where, json_settings(where, line, spellings) if line[0] == "{" else {"prompt": line}))
    if not lines:
        raise UsageError(f"--from-file {args.from_file} holds no prompts.")
    return lines


def read_prompt(file: str) -> str:
    """The one prompt that is the whole text of a file, without the white space around it."""
    prompt = read_text("--prompt-file", file).strip()
    if not prompt:
        raise UsageError(f"--prompt-file {file} holds no prompt.")
    return prompt


def read_text(flag: str, file: str) -> str:
    """The text of a file that a flag names; - is standard input."""
    if file == "-" and sys.stdin is None:
        raise UsageError(f"{flag} -: standard input is closed.")
    raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UsageError(f"{shown_source(file)}, line {line}: is no UTF-8 text. Save the file as UTF-8.") from None


def shown_source(file: str) -> str:
    return "standard input" if file == "-" else file


def json_settings(where: str, line: str, spellings: dict[str, str]) -> dict:
    """The settings of a line such as {"prompt": "a horse", "seed": 7}; any spelling of a flag is a key."""
    try:
        given = json.loads(line, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}is no JSON object: {error}. One whole object a line is expected.") from None
    own = {}
    for key, value in given:
        name = spellings.get(key, key)
        if name in own:
            raise UsageError(f"{where}{key!r} sets {name} for the second time.")
        if name not in FIELDS:
            raise UsageError(f"{where}{key!r} {nearest(key, FIELDS)}")
        if not is_of_type(value, FIELDS[name]):
            raise UsageError(f"{where}{key} cannot be {json.dumps(value)}.")
        own[name] = value
    if "prompt" not in own:
        raise UsageError(f'{where}has no "prompt".')
    return own


def pictures_each(args: argparse.Namespace) -> int:
    """How many pictures a prompt gets: of a file's lines, which fill batches together, --count each."""
    return args.count if args.from_file is not None else args.count * args.batch_size


def plan(
    args: argparse.Namespace, lines: Sequence[Line], seed: int, native: int, *, once: bool = False
) -> list[Settings]:
    """One job for each picture, in order; picture i of the run has seed + i, unless its line has a seed of its own.

    once  only one for each line: enough to find what is wrong with the settings
    """
    repeats = 1 if once else pictures_each(args)
    common = {
        "negative_prompt": args.negative_prompt,
        "plain_prompts": args.plain_prompts,
        "clip_skip": args.clip_skip,
        "steps": args.steps,
        "sampler": args.sampler,
        "schedule": args.schedule,
        "sigmas": args.sigmas,
        "eta": args.eta,
        "guidance_scale": args.guidance_scale,
        "guidance_rescale": args.guidance_rescale,
        "guidance_interval": args.guidance_interval,
        "reuse_features": args.reuse_features,
        "merge_tokens": args.merge_tokens,
        "zero_terminal_snr": args.zero_terminal_snr,
        "strength": getattr(args, "strength", 1.0),
        "hires": getattr(args, "hires", None),
        "hires_upscale": getattr(args, "hires_upscale", "latent"),
        "hires_strength": getattr(args, "hires_strength", 0.7),
        "hires_steps": getattr(args, "hires_steps", None),
        "tile": args.tile,
        "vary": args.vary or 0.0,
    }
    jobs: list[Settings] = []
    for line in lines:
        vary_seed = None if args.vary_seed is None else args.vary_seed + len(jobs)
        settings = {**common, "seed": seed + len(jobs), "vary_seed": vary_seed, **line.own}
        settings = {**size_of(args, settings, native), **settings}
        try:
            first = Settings(**settings)
            jobs += [first.counted_on(i) for i in range(repeats)]
        except SettingError as error:
            if not line.where:
                raise
            raise UsageError(f"{line.where}{error}") from None
    return jobs


def size_of(args: argparse.Namespace, settings: Mapping[str, object], native: int) -> dict[str, int]:
    """Width and height where a line has none of its own: those of the flags, or the model's native ones."""
    free = args.width is None and args.height is None and not {"width", "height"} & set(settings)
    width, height = first_size(settings["hires"], native) if free else (native, native)
    return {
        "width": width if args.width is None else args.width,
        "height": height if args.height is None else args.height,
    }


def group(jobs: Sequence[Settings], batch_size: int, chunk_count: Callable[[Settings], Hashable]) -> list[list[int]]:
    """The numbers of the jobs that are made at the same time, at most batch_size of them.

    They differ in prompts and seeds only, and need not be neighbours. Batches come in the order of their first jobs.

    chunk_count  how many chunks a job's prompts take; the same in a batch
    """
    batches: list[list[int]] = []
    newest: dict[Hashable, list[int]] = {}
    for number, job in enumerate(jobs):
        kind = (job.shared, chunk_count(job))
        if len(newest.get(kind, ())) in (0, batch_size):
            newest[kind] = []
            batches.append(newest[kind])
        newest[kind].append(number)
    return batches
