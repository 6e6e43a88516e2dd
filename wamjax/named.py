"""Resolves plug-ins by name: a known one, or ``package.module:attribute`` of your own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from wamjax.config import did_you_mean


def find(name: str, known: Mapping[str, Any], key: str) -> Any:
    """Returns the object that `name` stands for.

    Args:
      name: a key of `known`, or ``package.module:attribute``.
      known: name -> object, or where it is.
      key: config key or flag of the name, for messages.

    Raises:
      ValueError: the name does not exist; lists the known ones.
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
    """Imports the function, or other attribute, that `name` stands for.

    Args:
      name: ``package.module:attribute``.
      flag: flag or key of the name, for messages.

    Raises:
      ValueError: the name has another format, or the module or function does not exist.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"{flag}={name!r} must be of the form package.module:attribute")
    try:
        target = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{flag}={name!r}: {error}") from error
    if not hasattr(target, function):
        raise ValueError(
            f"{flag}={name!r}: module {module} has no {function!r}"
            f"{did_you_mean(function, vars(target))}"
        )
    return getattr(target, function)
