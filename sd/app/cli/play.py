"""`sd play`: the small model live in a browser."""

import argparse
import os
import sys
import webbrowser
from pathlib import Path

from sd.app.cli import flags, say
from sd.app.cli.parser import Parser
from sd.app.cli.terminal import Terminal

PORT = 7861


def parser() -> Parser:
    parser = Parser(
        prog="sd play",
        description="The small model of the package live in a browser: change words, seed, guidance, steps and\n"
        "sampler, stop at a step, paint into the latents, see what each word attends to. The page\n"
        "computes in the browser; this command only serves its files. The first time, it downloads\n"
        "the runtime (33 MB) and exports the networks, a minute or two. Ctrl+C ends it.",
        epilog="examples:\n"
        "  sd play\n"
        "  sd play -o play/                            (only write the folder, for any web server)",
    )
    # fmt: off
    add = parser.add_argument
    add("--port", type=flags.whole_number(0, 65535), default=PORT, metavar="N",
        help=f"0 takes a free one (default: {PORT})")
    add("-o", "--out", type=Path, metavar="DIR",
        help="write the folder there, print its path, and serve nothing. An older one is replaced")
    add("--webgpu", action="store_true",
        help="with the runtime for GPUs, too, 17 MB more, which browsers take where they may use one")
    add("--no-open", action="store_true", help="do not open the page in a browser")
    add("-q", "--quiet", action="store_true", help="no progress bars, only warnings and errors")
    # fmt: on
    return parser


def run(args: argparse.Namespace) -> int:
    from sd.app.cli.serve import listening
    from sd.app.jobs.playing import current_folder, write_folder
    from sd.app.jobs.static_server import FolderServer

    terminal = Terminal(quiet=args.quiet)
    if args.out is not None:
        write_folder(args.out, terminal, webgpu=args.webgpu)
        print(args.out)
        return 0
    with listening("127.0.0.1", args.port) as sock:
        folder = current_folder(terminal, webgpu=args.webgpu)
        address = f"http://127.0.0.1:{sock.getsockname()[1]}/"
        say(f"the live model is at {address} (Ctrl+C ends it)")
        if has_screen() and not args.no_open:
            webbrowser.open(address)
        with FolderServer(folder, sock) as server:
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                say("stopped.", quiet=args.quiet)
    return 0


def has_screen() -> bool:
    """Whether a browser has somewhere to show a page. Without a screen, Linux would start one in this terminal."""
    return sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())
