"""`sd serve`: a loaded model behind a page and the APIs that other programs speak."""

import argparse
import errno
import ipaddress
import os
import secrets
import socket
from contextlib import contextmanager
from pathlib import Path

from convert.errors import shown
from sd.app.cli import flags, say
from sd.app.cli.parser import Parser
from sd.app.errors import UsageError
from sd.app.jobs.extras import require

PORT = 7860
TOKEN = "SD_TOKEN"  # variable of the environment
GRACE = 10  # seconds for answers that are being sent when the server ends


def parser() -> Parser:
    parser = Parser(
        prog="sd serve",
        description="Load a model, and serve it: a page to use in a browser, and the APIs that other programs speak\n"
        "(our own, AUTOMATIC1111's, OpenAI's for images). Jobs wait in one queue. Ctrl+C ends it; finished\n"
        "pictures are kept.",
        epilog="examples:\n"
        "  sd serve                                    (the small model of the package)\n"
        "  sd serve -m v1-5-pruned-emaonly.ckpt --models checkpoints/\n"
        "  SD_TOKEN=$(openssl rand -hex 16) sd serve -m model.ckpt --host 0.0.0.0",
    )
    # fmt: off
    add = parser.group("server")
    add("--host", default="127.0.0.1", metavar="ADDRESS",
        help="where to listen (default: 127.0.0.1, for this machine only). Any other address needs a token")
    add("--port", type=flags.whole_number(0, 65535), default=PORT, metavar="N",
        help=f"0 takes a free one (default: {PORT})")
    add("--token", metavar="TEXT",
        help="what every request must bear: Authorization: Bearer TEXT, or as a password, with any user name. Better "
        f"given as {TOKEN} in the environment, which other users do not see")
    add(
        "--models",
        type=Path,
        metavar="FOLDER",
        help="let requests choose among the models in a folder, by name or hash",
    )
    add("--allow-host", action="append", default=[], metavar="NAME",
        help="a name under which this server is asked for, such as that of a proxy; can be given several times")
    add("--allow-origin", action="append", default=[], metavar="URL",
        help="let pages of another site use this server, such as https://chat.example; can be given several times")
    add("-o", "--out", "--outdir", default="outputs/", metavar="OUT",
        help="a folder for all pictures, or a template for their names, as for sd txt2img (default: outputs/)")
    add("--keep", type=flags.whole_number(1, 100_000), default=200, metavar="N",
        help="how many pictures stay in memory, and so in the page's gallery (default: 200)")
    add("--queue", type=flags.whole_number(1, 100_000), default=100, metavar="N",
        help="how many jobs may wait (default: 100)")
    # fmt: on
    from sd.app.cli.img2img import add_size_limit

    add_size_limit(add)
    flags.add_compile_flag(flags.add_model_flags(parser))
    flags.add_embeddings_flag(parser.add_argument)
    parser.add_argument("-q", "--quiet", action="store_true", help="only warnings and errors")
    return parser


def run(args: argparse.Namespace) -> int:
    check_address(args)
    from sd.app.cli.make_pictures import model_of
    from sd.app.cli.prompt_files import setting_spellings
    from sd.app.cli.terminal import Terminal
    from sd.app.cli.txt2img import parser as picture_parser
    from sd.app.jobs.outputs import name_pictures
    from sd.app.web.models import Models
    from sd.app.web.worker import Worker

    if args.models is not None and not args.models.is_dir():
        raise UsageError(f"--models {shown(str(args.models))} is not a folder.")
    models = Models(model_of(args), args.models)
    name_pictures(args.out, [])
    limits = {"keep": args.keep, "most_waiting": args.queue, "max_megapixels": args.max_megapixels}
    worker = Worker(models, out=args.out, **limits)
    with listening(args.host, args.port) as sock:
        worker.start(Terminal(quiet=args.quiet))
        spellings = {key: flag.dest for key, flag in setting_spellings(picture_parser()).items()}
        return serve(worker, sock, args, spellings)


def check_address(args: argparse.Namespace) -> None:
    """Raise UsageError for what is missing, or not safe."""
    from sd.app.web.limits import SHORTEST_TOKEN

    require("server", "sd serve")
    if args.token is None:
        args.token = os.environ.get(TOKEN) or None
    if args.token is None and not is_loopback(args.host):
        raise UsageError(
            f"--host {shown(args.host)} lets other machines in, which needs a token. Give one with {TOKEN} or --token, "
            f"for example {secrets.token_hex(16)}."
        )
    if args.token is not None and (len(args.token) < SHORTEST_TOKEN or not args.token.isascii()):
        raise UsageError(f"a token has at least {SHORTEST_TOKEN} ASCII characters, so that nobody guesses it.")
    for origin in args.allow_origin:
        if not origin.startswith(("http://", "https://")) or "/" in origin.partition("//")[2].rstrip("/"):
            raise UsageError(f"--allow-origin {shown(origin)} is not an origin. Example: https://chat.example.")


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def listening(host: str, port: int):
    """A socket that is bound before anything is loaded. Raises UsageError where it cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"--host {shown(host)} cannot be used: {error.strerror}.") from None
    with sock:
        if os.name == "posix":  # take the port again at once after an earlier server
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
            sock.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UsageError(f"port {port} is in use. Give another one: --port {port + 1}.") from None
            raise UsageError(f"--host {shown(host)} --port {port} cannot be used: {error.strerror}.") from None
        yield sock


def serve(worker, sock: socket.socket, args: argparse.Namespace, spellings: dict[str, str]) -> int:
    """Serve until an interrupt."""
    from sd.app.web.app import application
    from sd.app.web.guard import Rules, allowed
    from sd.app.web.server import Server

    hosts = allowed([args.host, socket.gethostname(), *args.allow_host])
    rules = Rules(token=args.token, hosts=hosts, origins=allowed(args.allow_origin))
    address = sock.getsockname()
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    say(f"serving {shown(worker.models.default.file.name)} at http://{host}:{address[1]}")
    Server(application(worker, rules, spellings), worker, GRACE).run(sockets=[sock])
    say("stopped; finished pictures are kept.", quiet=args.quiet)
    if not worker.join(0):
        os._exit(0)  # without waiting for the step that is still computed; Python would abort on its thread
    return 0
