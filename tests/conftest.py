"""Every test runs on the CPU with eight simulated devices.

The flags must be set before jax is imported anywhere.
"""

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
import types

import compiler

os.environ["JAX_PLATFORMS"] = "cpu"
# Read when gcsfs is imported; otherwise it looks for Google's credentials at every move and delete.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
os.environ["XLA_FLAGS"] = f"{compiler.flags(devices=8)} {os.environ.get('XLA_FLAGS', '')}"
# Workers, and the commands that they start, share a compilation cache in a folder of this test run.
# The user's own cache is neither read nor written unless requested.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs = tempfile.mkdtemp(prefix="wamjax-tests-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

# To shuffle n indices, grain spends 600 / n ms on each. Tests have few, and repeat them.
with contextlib.suppress(ImportError, AttributeError):
    from grain._src.python.dataset.transformations import shuffle

    shuffle.index_shuffle = types.SimpleNamespace(
        index_shuffle=functools.cache(shuffle.index_shuffle.index_shuffle)
    )


def pytest_collection_finish():
    """All test files are imported now."""
    compiler.collect_rarely()


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Frees the programs of each test file; otherwise two workers would hold over 6 GB each."""
    yield
    jax.clear_caches()
