"""The command `sd`: finds the command that is asked for, and turns errors into messages and exit codes.

Nothing heavy is imported before a command needs it, so that `sd --help` answers at once.
"""

import importlib
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

from sd import __version__
from sd.app.errors import JobError, UsageError
from sd.files import NO_ROOM
from sd.pipeline.settings import nearest

COMMANDS = {  # name -> what it does; each is a module of this package with `parser()` and `run(args)`
    "txt2img": "a picture from text",
    "img2img": "a picture from a picture and text",
    "inpaint": "repaint a part of a picture, or beyond its edges",
    "depth2img": "a picture from text and the depth of a picture",
    "edit": "change a picture by an instruction",
    "serve": "a loaded model behind a page, and the APIs that other programs speak",
    "depth": "how near each point of a picture is",
    "show": "how pictures were made: their settings, whoever made them",
    "explain": "a picture, and a page that shows how it was made",
    "play": "the small model live in a browser, to change and to look inside",
    "noise": "what noise and the VAE do to a picture",
    "tokens": "how a prompt is read: tokens, weights, chunks",
    "schedule": "the noise levels that a sampler visits",
    "convert": "a checkpoint from one layout to another",
    "export": "the networks of a model as ONNX files, for other programs",
    "inspect": "what is in a file, and whether it is safe",
    "diff": "which tensors of two files differ, and by how much",
    "extract": "the difference between two checkpoints as a LoRA",
    "merge": "a weighted sum of checkpoints, or a difference added to one",
    "models": "the original checkpoints: list, get, verify",
    "shards": "whether a run on many machines is complete",
    "bench": "how fast a model is on this machine, and where the time goes",
    "arch": "what a model consists of, as a table or a page to explore",
}
USED_ELSEWHERE = {  # what other programs call them
    **dict.fromkeys(("generate", "dream", "imagine", "t2i", "text2img", "text2image", "texttoimage"), "txt2img"),
    **dict.fromkeys(("i2i", "image2image", "imagetoimage"), "img2img"),
    **dict.fromkeys(("d2i", "depthtoimage", "depth2image"), "depth2img"),
    **dict.fromkeys(("depthmap", "midas", "estimatedepth"), "depth"),
    **dict.fromkeys(("outpaint", "outpainting", "inpainting"), "inpaint"),
    **dict.fromkeys(("instruct", "instructpix2pix", "pix2pix", "ip2p", "editing", "editcli"), "edit"),
    **dict.fromkeys(("server", "webui", "web", "api", "ui", "gui", "host", "listen"), "serve"),
    **dict.fromkeys(("info", "scan", "identify"), "inspect"),
    **dict.fromkeys(("pnginfo", "exif", "metadata", "parameters"), "show"),
    **dict.fromkeys(("live", "demo", "playground", "browser", "interactive"), "play"),
    **dict.fromkeys(("download", "pull", "verify"), "models"),
    **dict.fromkeys(("extractlora", "svd"), "extract"),
    **dict.fromkeys(("mergemodels", "checkpointmerger", "supermerger"), "merge"),
    **dict.fromkeys(("bake", "bakelora", "mergelora", "fuse"), "convert"),
}
DONE, BAD_INPUT, SOME_FAILED, INTERNAL_ERROR, INTERRUPTED = 0, 2, 3, 70, 130


def usage() -> str:
    commands = "\n".join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: sd COMMAND ...\n\n"
        "Stable Diffusion from scratch: an original checkpoint in, a picture out.\n\n"
        f"commands:\n{commands}\n\n"
        "sd help COMMAND describes a command, as sd COMMAND --help does; sd --version prints the version.\n\n"
        'examples:\n  sd txt2img "a red circle on a blue background"      (uses the small model of the package)\n'
        '  sd txt2img "an astronaut riding a horse" -m v1-5-pruned-emaonly.ckpt'
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    prepare_streams()
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):  # like an interrupt: half-written files are removed
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, signal.default_int_handler)
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = dispatch(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        unwritten_results()
        say("interrupted; finished files are kept.")
        return INTERRUPTED
    except Exception as error:
        unwritten = unwritten_results()
        if isinstance(unwritten, BrokenPipeError) or isinstance(error, BrokenPipeError):
            return DONE  # the reader of our results has closed the pipe
        if unwritten is not None and isinstance(error, OSError) and error.filename is None:
            error = OSError(unwritten.errno, unwritten.strerror, "standard output")
        if "--debug" in argv:
            say(traceback.format_exc().rstrip())
        message = message_of(error)
        if message is None:
            say(f"internal error: {type(error).__name__}: {error}")
            say("run the same command with --debug to see where, and please report it.")
            return INTERNAL_ERROR
        say(message)
        return SOME_FAILED if isinstance(error, JobError) else BAD_INPUT


def unwritten_results() -> OSError | None:
    """Why results could not be written to stdout. The interpreter then does not try it again as it exits."""
    try:
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
        return error
    return None


def dispatch(argv: list[str]) -> int:
    if argv[:1] == ["help"] and len(argv) > 1:
        argv = [*argv[1:], "--help"]
    if argv and argv[0] in ("-h", "--help", "--help-all", "help"):
        print(usage())
        return DONE
    if argv in (["--version"], ["-V"]):
        print(f"sd-zoo {__version__}")
        return DONE
    if not argv:
        raise UsageError(f"no command given. There are: {', '.join(COMMANDS)}. See sd --help.")
    if " " in argv[0].strip():
        raise UsageError(f'{argv[0]!r} is not a command. Did you mean sd txt2img "{argv[0]}"?')
    if argv[0].startswith("-"):
        from sd.app.cli.parser import PICTURES

        command = next((word for word in argv if word in PICTURES), "txt2img")
        rest = shlex.join(word for word in argv if word != command)
        raise UsageError(f"flags follow a command. Did you mean sd {command} {rest}?")
    if argv[0] not in COMMANDS:
        known = USED_ELSEWHERE.get(argv[0].lower().replace("_", "").replace("-", ""))
        meant = f"does not exist. Did you mean {known}?" if known else nearest(argv[0], COMMANDS)
        raise UsageError(f"command {argv[0]!r} {meant}")
    command = importlib.import_module(f"sd.app.cli.{argv[0]}")
    parser = command.parser()
    try:
        args = parser.parse_args(argv[1:])
    except SystemExit:  # after --help; wrong flags raise UsageError
        return DONE
    args.parser, args.given = parser, argv[1:]
    if getattr(args, "like", None) is not None:
        from sd.app.cli.like import apply_like

        unused, notes = apply_like(args, lambda text: say(text, quiet=args.quiet))
        if unused:
            say(f"{args.like.name}: could not use {'; '.join(unused)}")
        for note in notes:
            say(f"{args.like.name}: {note}", quiet=args.quiet)
    from convert.files.mapped import FileShortenedError, shrinking_watched
    from sd.runtime.cpu.waiting import sleep_where_busy

    sleep_where_busy()
    try:
        with shrinking_watched():
            return command.run(args)
    except FileShortenedError as error:
        raise UsageError(str(error)) from None


def message_of(error: Exception) -> str | None:
    """What to say about an error that the user can do something about; None for an internal one."""
    from convert.actions.target import TargetError
    from convert.errors import CheckpointError
    from sd.pipeline.image.reading import PictureError
    from sd.pipeline.settings import SettingError

    if isinstance(error, SettingError):
        return f"--{error.name.replace('_', '-')} {error.problem}"
    if isinstance(error, UsageError | JobError | CheckpointError | TargetError | PictureError):
        return str(error)
    if isinstance(error, OSError):
        place = "standard output" if error.filename is None and error.errno in NO_ROOM else error.filename
        if place is not None and error.strerror:  # files that we write are always named
            return f"{place}: {error.strerror}."
        return str(error)
    return None


def say(text: str, *, quiet: bool = False) -> None:
    """A message on stderr, since stdout carries results only. Control characters, which may come from names of files,
    do not reach the terminal."""
    from convert.errors import shown

    if not quiet:
        lines = [shown(line, 2000) for line in text.split("\n")]
        try:
            print("sd: " + "\n".join(lines), file=sys.stderr, flush=True)
        except OSError:  # a full disk or a closed pipe: nobody reads what we say, but the exit code still counts
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends


def prepare_streams() -> None:
    """Replace streams that were closed before we started; escape what a stream cannot encode."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the process ends
        elif hasattr(stream, "reconfigure"):
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 and name == "stdout" else "backslashreplace")
