"""uvicorn with patience that ends, and with a graceful end: jobs are stopped first, and so their streams of events."""

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from sd.app.web.limits import CONNECTIONS, HEAD_SECONDS
from sd.app.web.worker import Worker


class Protocol(H11Protocol):
    """HTTP that does not wait for ever for the head of a request; the guard does the same for its body."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self._patience is None:
            self._wait()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:  # the head is complete
            self._patience.cancel()
            self._patience = None

    def connection_lost(self, error: Exception | None) -> None:
        if self._patience is not None:
            self._patience.cancel()
        super().connection_lost(error)

    def _wait(self) -> None:
        self._patience = self.loop.call_later(HEAD_SECONDS, self.transport.close)


class Server(uvicorn.Server):
    """Serves an application. SIGINT or SIGTERM ends it; a second one does not wait for answers that are being sent.

    grace  seconds for these, and for the step that is being computed. Shortly before, who waits for its job is told
           that it was stopped
    """

    def __init__(self, app: ASGIApp, worker: Worker, grace: float):
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
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
        end = time.monotonic() + self.grace
        self.worker.close()
        asyncio.get_running_loop().call_later(0.8 * self.grace, self.worker.give_up)
        await super().shutdown(sockets)
        self.worker.join(max(0, end - time.monotonic()))

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
