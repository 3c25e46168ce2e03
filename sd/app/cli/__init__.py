"""The command `sd`: finds the command that was asked for and turns errors into sentences and exit codes.

Nothing heavy is imported before a command needs it, so that `sd --help` answers at once.
"""

import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

from sd import __version__
from sd.app.errors import JobError, UsageError, complain, message_of
from sd.pipeline.settings import nearest

COMMANDS = {  # name -> what it does; each is a module of this package with `parser()` and `run(args)`
    "txt2img": "a picture from text",
    "img2img": "a picture from a picture and text",
    "inpaint": "repaint a part of a picture, or beyond its edges",
    "explain": "a picture from text, and a page that shows how it was made",
    "noise": "what noise does to a picture, and the VAE",
    "tokens": "how a prompt is read: tokens, weights, chunks",
    "schedule": "the noise levels that a sampler visits",
    "convert": "a checkpoint from one layout to another",
    "inspect": "what is in a file, and whether it is safe",
    "diff": "which tensors of two files differ, and by how much",
    "models": "the original checkpoints: list, get, verify",
    "bench": "how fast a model is on this machine, and where the time goes",
    "arch": "what a model consists of, as a table or a page to explore",
}
DONE, BAD_INPUT, SOME_FAILED, OUR_FAULT, INTERRUPTED = 0, 2, 3, 70, 130


def usage() -> str:
    commands = "\n".join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: sd COMMAND ...\n\n"
        "Stable Diffusion from scratch: an original checkpoint in, a picture out.\n\n"
        f"commands:\n{commands}\n\n"
        "sd COMMAND --help tells more about one of them; sd --version prints the version.\n\n"
        'examples:\n  sd txt2img "a red circle on a blue background"      (by the small model of the package)\n'
        '  sd txt2img "an astronaut riding a horse" -m v1-5-pruned-emaonly.ckpt'
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    prepare_streams()
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):  # as an interrupt: what is half written is removed
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup has it ignored
                signal.signal(number, signal.default_int_handler)
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = dispatch(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        complain("interrupted; what was finished is kept.")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our results has seen enough. The interpreter must not try to flush the rest at its end.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
        return DONE
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        message = message_of(error)
        if message is None:
            complain(f"a fault of ours: {type(error).__name__}: {error}")
            complain("run the same command with --debug to see where, and please report it.")
            return OUR_FAULT
        complain(message)
        return SOME_FAILED if isinstance(error, JobError) else BAD_INPUT


def dispatch(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help", "help"):
        print(usage())
        return DONE
    if argv in (["--version"], ["-V"]):
        print(f"sd-zoo {__version__}")
        return DONE
    if not argv:
        raise UsageError(f"no command given. There are: {', '.join(COMMANDS)}. See sd --help.")
    if argv[0] not in COMMANDS:
        raise UsageError(f"command {argv[0]!r} {nearest(argv[0], COMMANDS)}")
    command = importlib.import_module(f"sd.app.cli.{argv[0]}")
    parser = command.parser()
    try:
        args = parser.parse_args(argv[1:])
    except SystemExit:  # the help was asked for; errors of use are UsageErrors
        return DONE
    args.given = argv[1:]  # as it was typed
    return command.run(args)


def prepare_streams() -> None:
    """Streams that were closed before we started swallow what is written; what a stream cannot show is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the process ends
        elif hasattr(stream, "reconfigure"):
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 and name == "stdout" else "backslashreplace")
