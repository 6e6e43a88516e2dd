"""What plugs in by its name: a known one, or ``package.module:attribute`` of one's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from wamjax.config import did_you_mean


def find(name: str, known: Mapping[str, Any], key: str) -> Any:
    """What `name` means.

    Args:
      name: a key of `known`, or ``package.module:attribute``.
      known: things, or where they are.
      key: where the name was given, for messages.

    Raises:
      ValueError: there is no such thing; names those that there are.
    """
    place = known.get(name, name)
    if not isinstance(place, str):
        return place
    if ":" not in place:
        raise ValueError(
            f"{key} = {name!r} does not exist{did_you_mean(name, known)}; there are "
            f"{', '.join(map(str, known))}, and 'package.module:attribute' of your own"
        )
    return resolve(place, key)


def resolve(name: str, flag: str) -> Callable:
    """The function, or other attribute, that `name` means.

    Args:
      name: ``package.module:attribute``.
      flag: where the name was given, for messages.

    Raises:
      ValueError: it is no such name, or there is no such module or function.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"{flag}={name!r} must be of the form package.module:attribute")
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
