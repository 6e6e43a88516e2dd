"""Serves environments over a socket: simulators in another environment or on another machine.

The serving side needs Python 3.9, NumPy, msgpack and the folder `wamjax` on its path, but no JAX:

    python -m wamjax.envs.remote --env=my_kitchen:Kitchen --port=7000

The other side then uses the world ``remote:at=HOST:7000``. Each connection is one environment in
its own process, with the messages of a local worker: one exchange per plan. A broken connection
counts as a crashed environment, which is restarted. A message is eight bytes of length followed by
bytes of `wamjax.serving.wire`: nothing is unpickled, and clients can only run episodes. But anyone
who reaches the port can: keep it on 127.0.0.1 and connect through ssh, or keep it in a private
network.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from wamjax.envs.worker import Demonstration, Died, Stretch, converse, parts_of
from wamjax.serving import wire

CALLS = ("describe", "reset", "play", "demonstrate")
TYPES = {"play": Stretch, "demonstrate": Demonstration}  # tuples here, lists on the other side
PORT = 7000
MOST_ASKED, MOST_ANSWERED = 2**26, 2**32  # maximum bytes of a request and of an answer
PATIENCE = 10.0  # seconds for a server to start listening
GRACE = 2.0  # seconds for an environment to end by itself when the other side is gone
_LENGTH = struct.Struct(">Q")


class Channel:
    """Passes values through a socket; see `wamjax.envs.worker.Pipe`.

    Args:
      most: maximum bytes of an incoming message.
    """

    def __init__(self, connection: socket.socket, most: int):
        self._socket, self._most = connection, most
        with contextlib.suppress(OSError):  # other kinds of sockets do not need it
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, value: Any) -> None:
        """Sends a message; raises OSError if the other side is gone."""
        data = wire.pack(value)
        self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def recv(self, timeout: float | None = None) -> Any:
        """Returns the next message.

        Raises:
          EOFError: the other side closed the connection.
          TimeoutError: it took longer than `timeout` seconds.
          wire.BadMessage: the bytes are not a message, or too large.
        """
        end = None if timeout is None else time.monotonic() + timeout
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, end))
        if length > self._most:
            raise wire.BadMessage(
                f"a message of {length} bytes is longer than the {self._most} allowed"
            )
        return wire.unpack(bytes(self._exactly(length, end)))

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()

    def _exactly(self, count: int, end: float | None) -> bytearray:
        data = bytearray(count)
        view, at = memoryview(data), 0
        while at < count:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            got = self._socket.recv_into(view[at : at + 2**20])
            if not got:
                raise EOFError
            at += got
        self._socket.settimeout(None)
        return data


class Connection:
    """Connects to an environment at ``HOST:PORT``; see `wamjax.envs.worker.Worker`.

    Args:
      timeout: maximum seconds for a plan or a reset.
    """

    def __init__(self, address: str, timeout: float):
        self._place, self._timeout = split(address), timeout
        self._channel: Channel | None = None
        self.restart()

    def restart(self) -> None:
        """Connects, or reconnects, to a new environment; `send` reports a failure."""
        self.close()
        end = time.monotonic() + PATIENCE
        while self._channel is None:
            try:
                connection = socket.create_connection(self._place, timeout=PATIENCE)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                self._channel = Channel(connection, MOST_ANSWERED)
            except OSError as error:
                self._failure = f"nothing answers at {self._place[0]}:{self._place[1]} ({error})"
                if time.monotonic() > end or isinstance(error, socket.gaierror):
                    return
                time.sleep(0.1)

    def send(self, name: str, *arguments: Any) -> None:
        """Requests a call of an environment; `receive` returns the answer."""
        if self._channel is None:
            raise Died(self._failure)
        self._name = name
        try:
            self._channel.send((name, arguments))
        except OSError as error:
            raise Died(f"the connection broke: {error}") from error

    def receive(self) -> Any:
        """Returns the answer to the last request.

        Raises:
          Died: the environment raised, its process ended, or it took too long.
        """
        try:
            kind, answer = self._channel.recv(self._timeout)
        except TimeoutError as error:
            raise Died(f"no answer within {self._timeout:.0f} s") from error
        except (EOFError, OSError) as error:
            raise Died(f"the connection broke: {str(error) or 'the other side hung up'}") from error
        except ValueError as error:
            raise Died(f"the answer does not come from an environment: {error}") from error
        if kind == "error":
            raise Died(answer)
        try:
            return TYPES[self._name](*answer) if self._name in TYPES else answer
        except TypeError as error:
            raise Died(
                f"{self._name}: the environment runs another version of wamjax ({error})"
            ) from error

    def close(self) -> None:
        """Closes the connection; the environment ends."""
        if self._channel is not None:
            self._channel.close()
        self._channel = None


def world(at: str = f"127.0.0.1:{PORT}", timeout: float = 300.0, workers: int = 0):
    """Returns the world that is served at an address, from its own description.

    Args:
      at: ``HOST:PORT``.
      timeout: maximum seconds for a plan or a reset.
      workers: number of environments at once; 0: one per processor of the server.

    Raises:
      ConnectionError: nothing is served there.
      ValueError: its description is invalid.
    """
    from wamjax.envs import host

    with host.connections(at, timeout, 1) as (connection,):
        try:
            connection.send("describe")
            about = connection.receive()
        except Died as error:
            raise ConnectionError(
                f"remote:at={at}: {error}. Start it there by python -m wamjax.envs.remote "
                "--env=MODULE:CLASS"
            ) from error
    about = about | {"address": at, "timeout": timeout}
    return host.described(about | ({"workers": workers} if workers else {}))


def split(address: str) -> tuple[str, int]:
    """Splits ``HOST:PORT`` into (host, port).

    Raises:
      ValueError: the text has another format.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit() and int(port) < 2**16):
        raise ValueError(f"address {address!r} of a world must be HOST:PORT")
    return host.strip("[]"), int(port)


class _Served(Channel):
    """Accepts calls of `CALLS`, and closes the connection on others."""

    def recv(self, timeout: float | None = None) -> tuple[str, list[Any]]:
        try:
            message = super().recv(timeout)
        except wire.BadMessage as error:
            print(f"hung up: {error}", file=sys.stderr)
            raise EOFError from error
        if isinstance(message, list) and len(message) == 2 and message[0] in CALLS:
            return message
        print(f"hung up: {wire.sentence(message)[:80]!r} is not a call", file=sys.stderr)
        raise EOFError


def answer(number: int, place: str, options: Mapping[str, Any]) -> None:
    """Runs the process of an environment on the socket with this file descriptor."""
    connection = socket.socket(fileno=number)
    threading.Thread(target=_leave, args=(number,), daemon=True).start()
    with contextlib.suppress(OSError):  # the client left before the answer
        converse(_Served(connection, MOST_ASKED), place, options)


def _leave(number: int) -> None:
    """Ends this process when the other side is gone, even if its simulator hangs."""
    poll = select.poll()
    poll.register(number, select.POLLRDHUP)
    poll.poll()
    time.sleep(GRACE)
    os._exit(1)


_PROGRAM = "from wamjax.envs.remote import answer; answer({}, {!r}, {!r})"


def serve(place: str, options: Mapping[str, Any], host: str, port: int) -> None:
    """Starts an environment for each connection until the process is told to end.

    Args:
      place: "module:attribute" that creates an environment, see `wamjax.envs.worker.Described`.
      options: arguments of the environment.
      port: 0: any free port; the actual one is printed.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    running: list[subprocess.Popen] = []
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=128) as listener:
        print(f"{place} at {host}:{listener.getsockname()[1]}", flush=True)
        try:
            while True:
                connection, _ = listener.accept()
                with connection:
                    number = connection.fileno()
                    program = _PROGRAM.format(number, place, dict(options))
                    running.append(subprocess.Popen(
                        [sys.executable, "-c", program], pass_fds=[number], env=environment,
                    ))  # fmt: skip
                running = [p for p in running if p.poll() is None]
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the server's command line; absl is not needed there."""
    out = argparse.ArgumentParser(
        "python -m wamjax.envs.remote", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    out.add_argument("--env", required=True, help="environment, as MODULE:CLASS[:option=value,...]")
    out.add_argument("--host", default="127.0.0.1", help="address to listen on")
    out.add_argument("--port", type=int, default=PORT, help="port; 0 = any free port")
    return out


def main(argv: list[str] | None = None) -> None:
    """Runs the server."""
    flags = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    place, options = parts_of(flags.env)
    with contextlib.suppress(KeyboardInterrupt):
        serve(place, options, flags.host, flags.port)


if __name__ == "__main__":
    main()
