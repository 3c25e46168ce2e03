"""uvicorn with a graceful end: jobs are stopped first, so that their streams of events end, too."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from sd.app.web.limits import CONNECTIONS
from sd.app.web.worker import Worker


class Server(uvicorn.Server):
    """Serves an application. SIGINT or SIGTERM ends it; a second one does not wait for answers that are being sent.

    grace  seconds for these
    """

    def __init__(self, app: ASGIApp, worker: Worker, grace: float):
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=grace,
            )
        )
        self.worker, self.grace = worker, grace

    async def shutdown(self, sockets=None) -> None:
        self.worker.close()
        await super().shutdown(sockets)
        self.worker.join(self.grace)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does it, but a signal that ends the server is not raised once more afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
