"""Prints messages on the terminal."""

from __future__ import annotations

import sys

import jax
from absl import flags, logging
from tqdm import tqdm


def say(text: str) -> None:
    """Prints in the process that speaks for all."""
    if jax.process_index() == 0:
        tqdm.write(text, file=sys.stderr)


def quiet() -> None:
    """Limits libraries' logs to warnings, unless ``--verbosity`` asks for more: Orbax logs every
    detail one level below."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
