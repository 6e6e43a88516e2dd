"""Locks files where the system supports it; elsewhere nothing is kept out, and nothing breaks.

A bucket has no locks. There `hold` keeps an object that changes regularly: a process that finds one
still changing leaves, and one whose object was taken over is notified.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from wamjax import files
from wamjax.console import say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


BEAT = 20.0  # seconds from one sign of life to the next
PATIENCE = 90.0  # seconds without one after which a holder counts as dead
_held: set[str] = set()  # tokens of this process


class Held(BlockingIOError):
    """Another process holds the lock; the message says which, or "" if unknown."""


def lock(file: IO, wait: bool = False) -> bool:
    """Locks an open file until it is closed or the process ends.

    Args:
      wait: whether to wait until the owner releases it.

    Returns:
      False where the system or the file system does not support locks.

    Raises:
      BlockingIOError: another process has it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:  # not every network file system has them
        return False
    return True


def host() -> str:
    """Returns the name of this machine."""
    return platform.node()


@contextlib.contextmanager
def hold(place: files.Path, lost: Callable[[str], None]) -> Iterator[None]:
    """Holds an object of a bucket while the block runs.

    The object names process and machine, and changes every `BEAT` seconds. One that does not change
    for `PATIENCE` belongs to a process that died for some reason, and is taken over; clocks are not
    compared. For a process of this machine that is gone, this is known at once. Two that begin at
    the same moment both succeed, and one of them is notified within a beat.

    Args:
      lost: called, in another thread, when another process has taken the object over.

    Raises:
      Held: another process holds it.
    """
    _wait_for_death(place)
    own = {"process": os.getpid(), "host": host(), "boot": _boot(), "token": secrets.token_hex(8)}
    files.write_text(place, json.dumps(own))
    _held.add(own["token"])
    stop = threading.Event()

    def live() -> None:
        beats = 0
        while not stop.wait(BEAT if beats else min(BEAT, 2.0)):
            beats += 1
            try:
                found = _read(place)
                if found is not None and found["token"] != own["token"]:
                    lost(_name(found))
                    return
                files.write_text(place, json.dumps(own | {"beats": beats}))
            except Exception as error:  # a network that is gone comes back; a lock cannot help it
                say(f"warning: {place} cannot be renewed: {error}")

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _held.discard(own["token"])
        found = _read(place)
        if found is not None and found["token"] == own["token"]:
            place.unlink(missing_ok=True)


def _wait_for_death(place: files.Path) -> None:
    first = _read(place)
    if first is None or _is_gone(first):
        return
    say(f"{place} says that {_name(first)} is at work there: waiting up to {PATIENCE:.0f} s for a "
        "sign of life")  # fmt: skip
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(BEAT, PATIENCE) / 4)
        found = _read(place)
        if found is None:
            return
        if found != first:
            raise Held(_name(found))
    say(f"{_name(first)} gave none: it is dead, and its place taken")


def _read(place: files.Path) -> dict[str, Any] | None:
    """Returns the content of the object, if it exists and can be read."""
    try:
        found = json.loads(place.read_text())
        return found if isinstance(found, dict) and "token" in found else None
    except (FileNotFoundError, ValueError):
        return None


def _name(found: dict[str, Any]) -> str:
    return f"process {found.get('process')} on {found.get('host')}"


def _is_gone(found: dict[str, Any]) -> bool:
    """Returns whether the object certainly belongs to a process of this machine that has ended."""
    here = bool(_boot()) and (found.get("host"), found.get("boot")) == (host(), _boot())
    if not here or found["token"] in _held:
        return False
    if found.get("process") == os.getpid():
        return True  # and not this one
    try:
        os.kill(int(found["process"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, TypeError, ValueError, KeyError):
        return False
    return False


def _boot() -> str:
    """Returns an id of this machine since its last boot, to distinguish machines of the same name;
    Linux only."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
