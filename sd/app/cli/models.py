"""`sd models`: the checkpoints that the authors of Stable Diffusion published."""

import argparse
import difflib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

from convert.errors import shown, size_text
from convert.published.download import download
from convert.published.known import Known, find_by_name, known_checkpoints, known_named, verify
from sd.app.cli import say
from sd.app.cli.parser import Parser
from sd.app.cli.terminal import aligned, progress_bar
from sd.app.errors import UsageError
from sd.app.jobs.model_folder import folders

RIGHT, WRONG = 0, 1
TOKEN_HOST = "huggingface.co"


def parser() -> Parser:
    parser = Parser(
        prog="sd models",
        description="The checkpoints that the authors of Stable Diffusion published: list them, download\n"
        "one, and verify files. Nothing is downloaded without get.",
        epilog="examples:\n"
        "  sd models\n"
        "  sd models get v1-5-pruned-emaonly      # sd txt2img -m v1-5 finds it then\n"
        "  sd models verify weights/*.ckpt\n\n"
        "sd models COMMAND --help describes a command.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    listing = commands.add_parser("list", help="list them (also without COMMAND)")
    listing.add_argument("--json", action="store_true", help="one JSON object a line, with addresses and sources")
    getting = commands.add_parser(
        "get",
        help="download one",
        description="Download a checkpoint. The same command again resumes an interrupted download. The\n"
        "file gets its name once its sha256 is right.",
        epilog="Some files require accepting a licence first: set HF_TOKEN to an access token. It is\n"
        f"sent only to {TOKEN_HOST}.",
    )
    add = getting.add_argument
    add("name", metavar="NAME", help="file name, as listed")
    add("-o", "--out", type=Path, metavar="DIR",
        help="folder (default: your models folder, the first one that SD_MODELS names)")  # fmt: skip
    add("--from", dest="source", metavar="ADDRESS", help="download it from there; its sha256 is checked")
    add("--force", action="store_true", help="replace a different file of that name")
    add("-q", "--quiet", action="store_true", help="no progress bar, only warnings and errors")
    verifying = commands.add_parser(
        "verify",
        help="check that files are what their authors published",
        description="Compare size and sha256 of files with the table, whatever their names: right, WRONG for a\n"
        "file that is not what its name says, unknown for any other, such as a fine-tune. The files\n"
        "are always read. Exit code 0 if all are right, else 1.",
    )
    verifying.add_argument("files", nargs="+", type=Path, metavar="FILE")
    verifying.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def run(args: argparse.Namespace) -> int:
    if args.command is not None and args.command != "list":
        return {"get": get_model, "verify": verify_files}[args.command](args)
    models = known_checkpoints()
    as_json = getattr(args, "json", False)
    print("\n".join((json.dumps(asdict(known)) for known in models) if as_json else table(models)))
    return RIGHT


def table(models: tuple[Known, ...]) -> Iterator[str]:
    rows = [("file", "size", "sha256", "licence", "")]
    for known in models:
        size = "unknown" if known.bytes is None else size_text(known.bytes)
        sha256, licence = (known.sha256 or "unknown")[:10], known.licence.removeprefix("CreativeML ")
        rows.append((known.file, size, sha256, licence, known.about))
    yield from aligned(rows, "<<<<<")
    yield ""
    yield "licences: all name uses that are not allowed; that of Stability AI also limits commercial use"
    yield "a size is unknown if no page states it to the byte; --json shows sources and addresses"


def get_model(args: argparse.Namespace) -> int:
    known = find_by_name(args.name)
    if known is None:
        if several := known_named(args.name):
            names = ", ".join(known.file for known in several)
            raise UsageError(f"{args.name!r} could be {names}. Give the whole name.")
        names = [known.file for known in known_checkpoints()]
        near = difflib.get_close_matches(args.name.lower(), names, n=2, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"model {args.name!r} is not known.{hint} sd models lists them.")
    folder = args.out or next(iter(folders()), None)
    if folder is None:
        raise UsageError("there is no home folder to put it into. Give a folder with -o.")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / known.file
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "a pipe or a device"
        raise UsageError(f"{target} is {kind}. Give another -o.")
    if target.exists() and not args.force:
        verdict = verify(target)
        if not verdict.matches or verdict.known != known:
            raise UsageError(
                f"{target} exists already and is a different file: it {verdict.problem}. --force replaces it."
            )
        say(f"{target} exists already and is right", quiet=args.quiet)
        print(target)
        return RIGHT
    address = args.source or known.address
    say(f"{known.about}, under the {known.licence} licence, from {address}", quiet=args.quiet)
    if known.sha256 is None:
        say("its sha256 is unknown, so the file cannot be checked")
    with progress_bar(known.file, args.quiet) as bar:

        def start(total: int | None, there: int) -> None:
            bar.total = total
            bar.update(there - bar.n)

        done = download(
            address,
            target,
            size=known.bytes,
            sha256=known.sha256,
            token=token_for(address),
            force=args.force,
            on_start=start,
            on_bytes=bar.update,
            on_wait=lambda problem, seconds: say(f"{problem}; trying again in {seconds:g} s", quiet=args.quiet),
        )
    before = f", {size_text(done.resumed_from)} of it resumed" if done.resumed_from else ""
    checked = "sha256 as published" if known.sha256 else f"sha256 {done.sha256}"
    say(f"{size_text(done.bytes)}{before}; {checked}", quiet=args.quiet)
    print(target)
    return RIGHT


def token_for(address: str) -> str | None:
    """The user's access token, only for the host that it belongs to."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    if parts.scheme != "https" or not (host == TOKEN_HOST or host.endswith("." + TOKEN_HOST)):
        return None
    return os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or None


def verify_files(args: argparse.Namespace) -> int:
    for path in args.files:
        if not path.is_file():
            raise UsageError(f"{shown(str(path))} is not a file.")
    code = RIGHT
    for path in args.files:
        verdict = verify(path)
        code = code if verdict.matches else WRONG
        if args.json:
            known = {"matches": verdict.matches, "file": verdict.known.file if verdict.known else None}
            found = {"sha256": verdict.sha256, "problem": verdict.problem}
            print(json.dumps({"path": str(path), **known, **found}))
        elif verdict.matches:
            print(f"right   {shown(str(path))}: {verdict.known.file}, {verdict.known.about}")
        else:
            word = "WRONG  " if verdict.known else "unknown"
            print(f"{word} {shown(str(path))} {verdict.problem}")
    return code
