"""The command `sd`: finds the command that was asked for and turns errors into sentences and exit codes.

Nothing heavy is imported before a command needs it, so that `sd --help` answers at once.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from sd import __version__
from sd.cli.errors import JobError, UsageError, message_of
from sd.settings import nearest

COMMANDS = {  # name -> what it does; each is a module of this package with `parser()` and `run(args)`
    "txt2img": "a picture from text",
    "convert": "a checkpoint from one layout to another",
}
DONE, BAD_INPUT, SOME_FAILED, OUR_FAULT, INTERRUPTED = 0, 2, 3, 70, 130


def usage() -> str:
    commands = "\n".join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: sd COMMAND ...\n\n"
        "Stable Diffusion from scratch: an original checkpoint in, a picture out.\n\n"
        f"commands:\n{commands}\n\n"
        "sd COMMAND --help tells more about one of them; sd --version prints the version.\n\n"
        'example:\n  sd txt2img "a photograph of an astronaut riding a horse" -m v1-5-pruned-emaonly.ckpt'
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in ("-h", "--help", "help"):
        print(usage())
        return DONE
    if argv == ["--version"]:
        print(f"sd-zoo {__version__}")
        return DONE
    debug = "--debug" in argv
    try:
        if not argv:
            raise UsageError(f"no command given. There are: {', '.join(COMMANDS)}. See sd --help.")
        if argv[0] not in COMMANDS:
            raise UsageError(f"command {argv[0]!r} {nearest(argv[0], COMMANDS)}")
        command = importlib.import_module(f"sd.cli.{argv[0]}")
        code = command.run(command.parser().parse_args(argv[1:]))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("sd: interrupted; what was finished is kept.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our results has seen enough. The interpreter must not try to flush the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if debug:
            raise
        message = message_of(error)
        if message is None:
            print(f"sd: a fault of ours: {type(error).__name__}: {error}", file=sys.stderr)
            print("Run the same command with --debug to see where, and please report it.", file=sys.stderr)
            return OUR_FAULT
        print(f"sd: {message}", file=sys.stderr)
        return SOME_FAILED if isinstance(error, JobError) else BAD_INPUT
