"""wamjax: world action models in JAX and Flax.

Importing the package is cheap: it pulls neither JAX nor any optional dependency.
`load_policy` is what a robot needs of it.
"""

__version__ = "0.1.0"
__all__ = ["__version__", "load_policy"]


def __dir__() -> list[str]:
    """What there is to use, also what is imported only when it is."""
    return sorted(__all__)


def __getattr__(name: str):
    if name == "load_policy":
        from wamjax.bundle.policy import load_policy

        return load_policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
