"""A client of an action server; needs Python 3.9, NumPy, msgpack and websockets, and no JAX."""

from __future__ import annotations

import itertools
import logging
import random
import socket as plain
import struct
import threading
import time
from typing import Any

import websockets.exceptions
import websockets.sync.client

from wamjax.serving import wire

CLOSE_WAIT = 0.1  # seconds that a robot waits for a goodbye
FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0  # seconds between attempts, doubled from one to the other


class ServerError(RuntimeError):
    """The server refused an observation or could not act on it; the text is its sentence."""


class Superseded(ServerError):
    """A newer observation of this client was acted on instead."""


class Client:
    """Asks a policy that is served; several threads may share one.

        with Client("127.0.0.1", 8000) as client:
            actions = client.infer(observation)["actions"]

    The name of the method is that of openpi's client. A connection that is lost is made again, and
    the question asked again, as long as its time is not over. When it is, the connection is
    closed: an answer that comes later is never taken for that of a later question.

    Attributes:
      metadata: what the server says of itself, see docs/robot.md; of the last connection.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | None = 8000,
        api_key: str | None = None,
        timeout: float = 10.0,
        connect_timeout: float = 60.0,
        **options: Any,
    ):
        """Connects.

        Args:
          host: name or address, or a whole ``ws://`` or ``wss://`` address.
          port: None: as the address says.
          timeout: seconds that one question may take.
          connect_timeout: seconds to go on trying at first, e.g. while the server compiles.
          options: further ones of `websockets.sync.client.connect`, such as ``ssl``.

        Raises:
          ConnectionError: no server came in time, or it does not let this client in.
        """
        self._address = host if host.startswith("ws") else f"ws://{host}"
        self._address += "" if port is None else f":{port}"
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self._timeout, self._options = timeout, options
        self._lock, self._numbers, self._socket = threading.Lock(), itertools.count(1), None
        self.metadata: dict[str, Any] = {}
        with self._lock:
            self._connect(time.monotonic() + connect_timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def infer(self, observation: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
        """Asks for a chunk of actions.

        Args:
          observation: in the names of `metadata`, with any of its extras, and with ``prefix``: the
            actions (d, a) that the robot is committed to, if its policy takes them.
          timeout: seconds; that of the client by default.

        Returns:
          ``actions`` (j, a), ``server_timing`` and ``policy_timing`` in milliseconds, and the
          extras of the observation.

        Raises:
          ServerError: the server says why it does not act on this.
          TimeoutError: no answer came in time; the connection is closed.
          ConnectionError: there was none, for all that time.
        """
        until = time.monotonic() + (self._timeout if timeout is None else timeout)
        with self._lock:
            number = f"{id(self):x}-{next(self._numbers)}"
            asked = dict(observation)
            mine = asked.setdefault("request_id", number) == number
            data = wire.pack(asked)
            while True:
                if self._socket is None:
                    self._connect(until)
                try:
                    answer = self._exchange(data, until)
                    break
                except websockets.exceptions.ConnectionClosed as error:
                    self._drop()
                    if time.monotonic() >= until:
                        raise ConnectionError(f"{self._address} hung up: {error}") from None
                    logging.warning("%s hung up (%s): once more", self._address, error)
            return self._read(answer, asked["request_id"], mine)

    def close(self) -> None:
        """Hangs up; the next question connects again."""
        with self._lock:
            self._drop()

    def _exchange(self, data: bytes, until: float) -> bytes | str:
        try:
            self._socket.send(data)
            return self._socket.recv(timeout=max(0.0, until - time.monotonic()))
        except TimeoutError:
            self._drop()
            raise TimeoutError(f"no answer of {self._address} in time; hung up, so that it is not "
                               "taken for a later one") from None  # fmt: skip

    def _read(self, answer: bytes | str, number: Any, mine: bool) -> dict[str, Any]:
        if isinstance(answer, str):
            raise ServerError(answer)
        out = wire.unpack(answer)
        echoed = out.pop("request_id", None) if mine else out.get("request_id")
        if echoed not in (None, number):  # a plain openpi server echoes none
            self._drop()
            raise ConnectionError(f"{self._address} answered question {echoed}, not {number}")
        if out.get("superseded"):
            raise Superseded("a newer observation was acted on")
        return out

    def _connect(self, until: float) -> None:
        """Tries until it succeeds or the time is over; waits longer from one time to the next."""
        wait = FIRST_WAIT
        while True:
            try:
                self._open(max(0.1, until - time.monotonic()))
                return
            except websockets.exceptions.InvalidStatus as error:
                if error.response.status_code in (401, 403):
                    body = (error.response.body or b"").decode(errors="replace")
                    raise ConnectionError(f"{self._address} does not let us in: {body}") from None
                reason: Exception = error
            except (OSError, websockets.exceptions.WebSocketException, EOFError) as error:
                reason = error
            left = until - time.monotonic()
            if left <= 0:
                raise ConnectionError(f"no server at {self._address}: {reason}") from None
            # Robots that lost the same server do not all come back at the same moment.
            time.sleep(min(left, wait * random.uniform(0.5, 1.0)))
            wait = min(2 * wait, LONGEST_WAIT)

    def _open(self, seconds: float) -> None:
        connection = websockets.sync.client.connect(
            self._address, compression=None, max_size=None, additional_headers=self._headers,
            open_timeout=min(seconds, 10.0), close_timeout=CLOSE_WAIT, **self._options,
        )  # fmt: skip
        socket = connection.__enter__()  # as websockets wants it from 17.1 on; left by `close`
        try:
            if hasattr(plain, "SO_SNDTIMEO"):  # a server that reads nothing must not hold us up
                longest = struct.pack("ll", int(self._timeout), int(self._timeout % 1 * 1e6))
                socket.socket.setsockopt(plain.SOL_SOCKET, plain.SO_SNDTIMEO, longest)
            self.metadata = wire.unpack(socket.recv(timeout=seconds))
        except BaseException:
            socket.close()
            raise
        self._socket = socket

    def _drop(self) -> None:
        socket, self._socket = self._socket, None
        if socket is not None:
            socket.close()
