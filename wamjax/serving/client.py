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

CLOSE_WAIT = 0.1  # seconds to wait for the closing handshake
FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0  # seconds between attempts, doubled each time


class ServerError(RuntimeError):
    """The server refused an observation or failed to act on it; the text is the server's."""


class Superseded(ServerError):
    """A newer observation of this client was acted on instead."""


class Client:
    """Requests action chunks from a served policy; thread-safe.

        with Client("127.0.0.1", 8000) as client:
            actions = client.infer(observation)["actions"]

    `infer` has the name that openpi's client uses. After a lost connection the client reconnects
    and repeats the request until its timeout. On a timeout it closes the connection, so a late
    answer is never mistaken for the answer to a newer request.

    Attributes:
      metadata: the server's metadata from the last connection, see docs/robot.md.
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
          host: name or address, or a full ``ws://`` or ``wss://`` address.
          port: None if the address contains it.
          timeout: seconds for one request.
          connect_timeout: seconds to keep trying at first, e.g. while the server compiles.
          options: passed to `websockets.sync.client.connect`, such as ``ssl``.

        Raises:
          ConnectionError: no server answered in time, or it rejected this client.
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
        """Requests an action chunk.

        Args:
          observation: with the keys in `metadata` and any of its extras; ``prefix`` holds the
            actions (d, a) that the robot is committed to, if the policy accepts them.
          timeout: seconds; the client's by default.

        Returns:
          ``actions`` (j, a), ``server_timing`` and ``policy_timing`` in milliseconds, and the
          extras of the observation.

        Raises:
          ServerError: the server refused the observation; the message says why.
          TimeoutError: no answer in time; the connection is closed.
          ConnectionError: no connection could be made in that time.
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
                        raise ConnectionError(
                            f"{self._address} closed the connection: {error}"
                        ) from None
                    logging.warning("%s closed the connection (%s): trying once more",
                                    self._address, error)  # fmt: skip
            return self._read(answer, asked["request_id"], mine)

    def close(self) -> None:
        """Closes the connection; the next request reconnects."""
        with self._lock:
            self._drop()

    def _exchange(self, data: bytes, until: float) -> bytes | str:
        try:
            self._socket.send(data)
            return self._socket.recv(timeout=max(0.0, until - time.monotonic()))
        except TimeoutError:
            self._drop()
            raise TimeoutError(
                f"no answer of {self._address} in time; closed the connection, so that a late "
                "answer is not taken for a newer one"
            ) from None

    def _read(self, answer: bytes | str, number: Any, mine: bool) -> dict[str, Any]:
        if isinstance(answer, str):
            raise ServerError(answer)
        out = wire.unpack(answer)
        echoed = out.pop("request_id", None) if mine else out.get("request_id")
        if echoed not in (None, number):  # a plain openpi server echoes none
            self._drop()
            raise ConnectionError(f"{self._address} answered request {echoed}, not {number}")
        if out.get("superseded"):
            raise Superseded("the policy acted on a newer observation")
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
                    raise ConnectionError(
                        f"{self._address} refused the connection: {body}"
                    ) from None
                reason: Exception = error
            except (OSError, websockets.exceptions.WebSocketException, EOFError) as error:
                reason = error
            left = until - time.monotonic()
            if left <= 0:
                raise ConnectionError(f"no server at {self._address}: {reason}; start it") from None
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
