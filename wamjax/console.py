"""What is said to people on the terminal."""

from __future__ import annotations

import sys

import jax
from absl import flags, logging
from tqdm import tqdm


def say(text: str) -> None:
    """Prints on the process that speaks for all."""
    if jax.process_index() == 0:
        tqdm.write(text, file=sys.stderr)


def quiet() -> None:
    """Lets libraries speak from warnings on, unless ``--verbosity`` asks for more: Orbax tells its
    every thought at the next level."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
