"""Functions by name, as flags give them: ``package.module:function``."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from wamjax.config import did_you_mean


def resolve(name: str, flag: str) -> Callable:
    """The function that `name` means.

    Args:
      name: ``package.module:function``.
      flag: where the name was given, for messages.

    Raises:
      ValueError: it is no such name, or there is no such module or function.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"{flag}={name!r} must name a function as package.module:function")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{flag}={name!r}: {error}") from error
    if not hasattr(found, function):
        raise ValueError(
            f"{flag}={name!r}: module {module} has no {function!r}"
            f"{did_you_mean(function, vars(found))}"
        )
    return getattr(found, function)
