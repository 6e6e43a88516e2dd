"""Loads published weights and exports trained ones: see `api`, and `wamjax.convert` for the
command."""

from wamjax.weights.api import export, load
from wamjax.weights.bounds import BadFile
from wamjax.weights.families import FAMILIES, functions
from wamjax.weights.plan import Mismatch
from wamjax.weights.sizing import config_of

__all__ = ["FAMILIES", "BadFile", "Mismatch", "config_of", "export", "functions", "load"]
