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
