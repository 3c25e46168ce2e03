"""Start `sd`. An interrupt ends it with one line and exit code 130, also while Python still imports, or as it exits."""

import gc
import os
import signal
import sys


def main() -> int:
    """Run the command line of this process and return its exit code."""
    usual = signal.getsignal(signal.SIGINT)
    own = usual is signal.default_int_handler  # a shell's background ignores interrupts
    if own:
        signal.signal(signal.SIGINT, end)
    from sd.app.cli import INTERRUPTED
    from sd.app.cli import main as run

    try:
        signal.signal(signal.SIGINT, usual)
        code = run()
        if own:
            signal.signal(signal.SIGINT, end)
    except KeyboardInterrupt:
        end()
    if code == INTERRUPTED:
        os._exit(code)  # all is said and tidied up; threads that still compute are not waited for
    gc.freeze()  # or Python searches all that was imported for garbage before it ends: 0.4 s with PyTorch
    return code


def end(*_: object) -> None:
    """Where nothing has begun, or all is done: end at once, since Python would print a traceback."""
    try:
        os.write(2, b"sd: interrupted.\n")
    finally:
        os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
