"""World action models: slots and roles, objectives and policies."""

from __future__ import annotations


def build(config, spec):
    """Makes the objective that ``config.objective.name`` asks for.

    Args:
      config: the whole resolved config.
      spec: `wamjax.data.spec.DataSpec` of the data, for the sizes that data decides.
    """
    from wamjax.wam import builders

    try:
        builder = builders.OBJECTIVES[config.objective.name]
    except KeyError:
        raise ValueError(
            f"objective.name {config.objective.name!r} is not one of {sorted(builders.OBJECTIVES)}"
        ) from None
    return builder(config, spec)


def check_training(config) -> None:
    """What a config must have right to train, and need not have to act; builds nothing.

    Raises:
      ValueError: names the key and the fix.
    """
    from wamjax.wam import builders

    builders.CHECKS.get(config.objective.name, lambda config: None)(config)
