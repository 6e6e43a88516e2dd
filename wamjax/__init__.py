"""wamjax: world action models in JAX and Flax.

Importing the package is cheap: it pulls neither JAX nor any optional dependency.
"""

__version__ = "0.1.0"
