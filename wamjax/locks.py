"""Locks of files, where the system has them; elsewhere nothing is kept out, and nothing breaks."""

from __future__ import annotations

import platform
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def lock(file: IO, wait: bool = False) -> bool:
    """Locks an open file until it is closed or the process ends.

    Args:
      wait: until whoever has it lets go.

    Returns:
      False where the system or the file system knows no locks.

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
    """The name of this machine."""
    return platform.node()
