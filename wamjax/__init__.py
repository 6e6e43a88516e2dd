"""wamjax: world action models in JAX and Flax.

Importing the package is cheap: it loads neither JAX nor any optional dependency. `load_policy` is
all that a robot needs.
"""

__version__ = "0.1.0"
__all__ = ["__version__", "load_policy"]


def __dir__() -> list[str]:
    """Returns all public names, including those that are imported on first use."""
    return sorted(__all__)


def __getattr__(name: str):
    if name == "load_policy":
        from wamjax.bundle.policy import load_policy

        return load_policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
