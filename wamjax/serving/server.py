"""Serves a policy on a port: openpi's websocket protocol, ``POST /act``, ``/healthz``,
``/metrics``.

One ASGI application serves both protocols, since the server of the websockets library answers no
POST. The event loop only moves bytes: `wire` bounds messages, and the worker's thread does the
rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import ipaddress
import itertools
import json
import logging
import pathlib
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from wamjax.serving import metrics as counted
from wamjax.serving import wire, worker
from wamjax.serving.wire import BadMessage
from wamjax.serving.worker import Answer, Worker

PROTOCOL = 1  # version of the metadata and the extras
UNANSWERED = 32  # queued messages of a client after which no more are read
BAD_IN_A_ROW = 16  # bad messages after which a client is disconnected
KEY_LENGTH = 16
BODY_SECONDS = 10.0
HEAD_SECONDS = 10.0  # time for a connection to send a request
GOING, TRY_LATER, POLICY, UNSUPPORTED = 1001, 1013, 1008, 1003  # codes of a closed websocket


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits what clients may request.

    Attributes:
      message: maximum bytes per message.
      clients: maximum number of websockets and HTTP requests at once.
      rate: observations per second and client; as many may be saved up.
      drain: seconds that a stopping server has to answer the queued requests.
    """

    message: int = 2**23
    clients: int = 64
    rate: float = 200.0
    drain: float = 10.0


class Rate:
    """Implements a token bucket: `rate` tokens per second, at most as many stored, but at least
    one."""

    def __init__(self, rate: float, now: float):
        self.rate, self._tokens, self._updated = rate, max(1.0, rate), now

    def take(self, now: float) -> bool:
        """Takes a token and returns whether there was one."""
        gained = (now - self._updated) * self.rate
        self._tokens, self._updated = min(max(1.0, self.rate), self._tokens + gained), now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Application:
    """Handles the requests on each path.

    Attributes:
      about: the constant part of the metadata.
      key: API key that clients need; '' = none.
      draining: whether the server accepts nothing new.
    """

    def __init__(
        self, work: Worker, about: Mapping[str, Any], limits: Limits = Limits(), key: str = ""
    ):
        self.work, self.about, self.limits, self.key = work, dict(about), limits, key
        self.draining, self._names = False, itertools.count()
        self._clients: set[int] = set()
        self._rates: dict[str, Rate] = {}  # for HTTP, by address
        self.asgi = Starlette(routes=[
            Route("/healthz", self.healthz), Route("/metrics", self.metrics),
            Route("/act", self.act, methods=["POST"]),
            WebSocketRoute("/{path:path}", self.converse),
        ])  # fmt: skip

    def metadata(self) -> dict[str, Any]:
        """Returns the first message to a client."""
        return self.about | {"protocol": PROTOCOL, "latency_ms": self.work.latency()}

    async def healthz(self, request: Request) -> Response:
        """Reports that the server is running, in openpi's format."""
        if self.draining:
            return PlainTextResponse("shutting down\n", 503)
        return PlainTextResponse("OK\n")

    async def metrics(self, request: Request) -> Response:
        """Returns the counters for Prometheus."""
        if refusal := self._refusal(request, slot=False):
            return refusal
        return Response(self.work.metrics.text(), media_type="text/plain; version=0.0.4")

    async def act(self, request: Request) -> Response:
        """Answers one observation in JSON with its actions."""
        if refusal := self._refusal(request):
            return refusal
        host, now = request.client.host if request.client else "", time.monotonic()
        if len(self._rates) > 16 * self.limits.clients:
            self._rates.clear()
        if not self._rates.setdefault(host, Rate(self.limits.rate, now)).take(now):
            self.work.metrics.requests.labels(counted.LIMITED).inc()
            return _error(f"at most {self.limits.rate:g} observations a second", 429)
        with self._slot() as client:
            try:
                body = await asyncio.wait_for(self._body(request), BODY_SECONDS)
                message, packed = await asyncio.to_thread(wire.from_json, body)
            except TimeoutError:
                return _error("the body did not come", 408)
            except BadMessage as error:
                self.work.metrics.requests.labels(counted.REFUSED).inc()
                return _error(str(error), 413 if "bytes at most" in str(error) else 400)
            answer = await self._ask(client, message)
        if answer.outcome != "ok":
            status = {counted.REFUSED: 400, counted.FAILED: 500}.get(answer.outcome, 503)
            return _error(answer.error or answer.outcome, status)
        content = wire.to_json(answer.actions, packed)
        if isinstance(message, dict) and packed and b'"encoded"' in body[:16]:
            content = json.dumps(content)
        headers = {"Server-Timing": f"infer;dur={answer.timing['infer']:.3f}"}
        if answer.rung is not None:
            headers["X-rung"] = str(answer.rung)
        for name in ("request_id", "timestamp"):
            text = str(answer.extras.get(name, ""))
            if text and text.isascii() and text.isprintable():  # headers hold only printable ASCII
                headers[f"X-{name.replace('_', '-')}"] = text
        return JSONResponse(content, headers=headers)

    async def converse(self, websocket: WebSocket) -> None:
        """Serves one websocket client until it disconnects."""
        if refusal := self._refusal(websocket):
            await websocket.send_denial_response(refusal)
            return
        with self._slot() as client:
            answers: asyncio.Queue = asyncio.Queue(UNANSWERED)
            await websocket.accept()
            with contextlib.suppress(
                WebSocketDisconnect, RuntimeError
            ):  # the client may leave at any time
                await websocket.send_bytes(wire.pack(self.metadata()))
                sending = asyncio.create_task(self._answer(websocket, answers))
                try:
                    await self._listen(websocket, client, answers)
                finally:
                    sending.cancel()

    async def _listen(self, websocket: WebSocket, client: int, answers: asyncio.Queue) -> None:
        """Receives observations until the client leaves or is disconnected."""
        rate, bad = Rate(self.limits.rate, time.monotonic()), 0
        while True:
            event = await websocket.receive()
            if event["type"] == "websocket.disconnect":
                return
            arrival = time.perf_counter()
            if (data := event.get("bytes")) is None:
                await websocket.close(UNSUPPORTED, "send observations as binary frames")
                return
            if not rate.take(time.monotonic()):
                answer: Any = Answer(counted.LIMITED, error=f"at most {self.limits.rate:g} "
                                    "observations a second")  # fmt: skip
                self.work.metrics.requests.labels(counted.LIMITED).inc()
            else:
                try:
                    answer, bad = self._ask(client, wire.unpack(data)), 0
                except BadMessage as error:
                    answer, bad = Answer(counted.REFUSED, error=str(error)), bad + 1
                    self.work.metrics.requests.labels(counted.REFUSED).inc()
            await answers.put((arrival, answer))
            if bad >= BAD_IN_A_ROW:
                await websocket.close(POLICY, "too many bad messages")
                return

    async def _answer(self, websocket: WebSocket, answers: asyncio.Queue) -> None:
        """Sends answers in the order of their observations."""
        previous = None
        while True:
            arrival, answer = await answers.get()
            if not isinstance(answer, Answer):
                answer = await answer
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                if answer.outcome in ("ok", counted.SUPERSEDED):
                    await websocket.send_bytes(wire.pack(_reply(answer, previous)))
                else:
                    await websocket.send_text(answer.error)
            previous = 1e3 * (time.perf_counter() - arrival)

    def _ask(self, client: int, message: Any) -> asyncio.Future:
        """Submits an observation to the worker and returns the future of its `Answer`."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def done(answer: Answer) -> None:
            loop.call_soon_threadsafe(_resolve, future, answer)

        self.work.submit(worker.Request(client, message, done))
        return future

    def _refusal(self, connection: HTTPConnection, slot: bool = True) -> Response | None:
        """Returns why a client is refused, or None if it is accepted."""
        key = connection.headers.get("authorization", "").partition(" ")[2]
        if self.key and not hmac.compare_digest(key.encode(), self.key.encode()):
            return _error("an API key is needed: Authorization: Api-Key KEY", 401)
        if not self.key and "origin" in connection.headers:
            # A page in the user's browser can reach loopback, but cannot omit this header.
            return _error("browsers are let in with an API key only", 403)
        if self.draining:
            return _error("the server is shutting down", 503)
        if slot and len(self._clients) >= self.limits.clients:
            return _error(f"there are {self.limits.clients} clients already", 503)
        return None

    @contextlib.contextmanager
    def _slot(self):
        """Registers a client for the duration of the context."""
        client = next(self._names)
        self._clients.add(client)
        self.work.metrics.clients.set(len(self._clients))
        try:
            yield client
        finally:
            self._clients.discard(client)
            self.work.metrics.clients.set(len(self._clients))
            self.work.forget(client)

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.limits.message:
                raise BadMessage(f"a message has {self.limits.message} bytes at most")
        return bytes(body)


class Server(uvicorn.Server):
    """Listens, and on a signal answers the queued requests before it ends."""

    def __init__(
        self, application: Application, sock: socket.socket, greeting: str = "", **tls: Any
    ):
        """Creates a server that does not listen yet.

        Args:
          sock: a bound socket, see `bind`.
          greeting: printed once the server listens.
          tls: uvicorn's ``ssl_certfile`` and so on.
        """
        self.application, self._socket, self._greeting = application, sock, greeting
        self._idle_since: dict[Any, float] = {}  # connection -> time of the first sight
        # uvicorn logs an incomplete handshake for every refused client.
        logging.getLogger("uvicorn.error").addFilter(_is_no_refusal)
        super().__init__(uvicorn.Config(
            application.asgi, http="h11", ws="websockets-sansio", lifespan="off", loop="asyncio",
            log_config=None, access_log=False, server_header=False, proxy_headers=False,
            ws_max_size=application.limits.message, ws_per_message_deflate=False,
            # The loop never blocks on the policy, so pings of a live client always get through.
            ws_ping_interval=20.0, ws_ping_timeout=60.0, timeout_graceful_shutdown=5, **tls,
        ))  # fmt: skip

    def run(self, sockets: Any = None) -> None:
        """Serves until a signal."""
        super().run(sockets=[self._socket])

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Drains on the first signal, ends on the second."""
        if self.application.draining or sig == signal.SIGINT and self.should_exit:
            self.should_exit = self.force_exit = True
            return
        self.application.draining = True
        logging.info("draining: %s", signal.Signals(sig).name)
        self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._drain()))

    async def on_tick(self, counter: int) -> bool:
        """Closes connections that never complete a request, which uvicorn does not."""
        now, connections = time.monotonic(), self.server_state.connections
        self._idle_since = {c: self._idle_since.get(c, now) for c in connections if _is_asking(c)}
        for connection, since in self._idle_since.items():
            if now - since > HEAD_SECONDS:
                connection.transport.abort()
        return await super().on_tick(counter)

    async def startup(self, sockets: Any = None) -> None:
        """Opens the port."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self._greeting:
            print(self._greeting, flush=True)

    async def _drain(self) -> None:
        seconds = self.application.limits.drain
        ended = await asyncio.to_thread(self.application.work.stop, seconds)
        if not ended:
            logging.warning("after %g s not everything was answered", seconds)
        await asyncio.sleep(0.1)  # let the last answers leave
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket bound to an address, not yet listening: early connections are refused.

    Raises:
      OSError: the address is taken or does not exist.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(
            f"cannot serve at {host}:{port}: {error.strerror}; set another --host or --port"
        ) from None
    return sock


def address(sock: socket.socket) -> str:
    """Returns host and port of a socket."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def read_key(file: str, host: str) -> str:
    """Returns the API key in a file; '' if there is no file and none is needed.

    Raises:
      ValueError: other machines can reach the address and there is no key, or it is too short.
    """
    if not file:
        if not _is_loopback(host):
            raise ValueError(f"--host={host} can be reached by others: give --key_file=FILE with "
                             "an API key, such as\n  openssl rand -hex 32 > FILE")  # fmt: skip
        return ""
    key = pathlib.Path(file).expanduser().read_text().strip()
    if len(key) < KEY_LENGTH or not key.isascii():
        raise ValueError(
            f"the key in --key_file={file} must have at least {KEY_LENGTH} ASCII characters"
        )
    return key


def _is_asking(connection: Any) -> bool:
    """Returns whether a connection of uvicorn has no request yet, or none any more."""
    if hasattr(connection, "handshake_initiated"):  # a websocket
        return not connection.handshake_initiated
    return connection.cycle is None or connection.cycle.response_complete


def _is_no_refusal(record: logging.LogRecord) -> bool:
    return "without completing handshake" not in str(record.msg)


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _reply(answer: Answer, previous: float | None) -> dict[str, Any]:
    """Returns a message of actions, its only array, since openpi's broker slices every array."""
    if answer.outcome == counted.SUPERSEDED:
        return {"superseded": True} | answer.extras
    timing = answer.timing
    server = {"infer_ms": timing["infer"], "prepare_ms": timing["prepare"],
              "queue_ms": timing["queue"], "batch": timing["batch"]}  # fmt: skip
    if previous is not None:
        server["prev_total_ms"] = previous
    rung = {} if answer.rung is None else {"rung": answer.rung}
    return answer.extras | rung | {
        "actions": answer.actions, "policy_timing": {"infer_ms": timing["infer"]},
        "server_timing": server,
    }  # fmt: skip


def _resolve(future: asyncio.Future, answer: Answer) -> None:
    if not future.done():
        future.set_result(answer)


def _error(text: str, status: int) -> Response:
    return JSONResponse({"error": text}, status)
