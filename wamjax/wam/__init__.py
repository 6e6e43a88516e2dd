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


def spec_of(values):
    """The spec of a run's data from its json in a checkpoint: of episodes, or of arrays.

    Returns:
      `wamjax.data.spec.DataSpec`, which has cameras, or `wamjax.data.arrays.ArraySpec`.
    """
    from wamjax.data.arrays import ArraySpec
    from wamjax.data.spec import DataSpec

    return (DataSpec if "cameras" in values else ArraySpec).from_json(values)


def check_kind(config, spec, workdir, wanted: str) -> None:
    """That a run trained what a command is for.

    Args:
      spec: of its data, see `spec_of`.
      wanted: "policy", or "pictures".

    Raises:
      ValueError: it trained something else; names the command that is for that.
    """
    name = config.objective.name
    if name == "codec":
        kind, command = "a codec", "reconstruct"
    elif hasattr(spec, "cameras"):
        kind, command = "a policy", "evaluate"
    else:
        kind, command = "a model of pictures", "sample"
    if kind != {"policy": "a policy", "pictures": "a model of pictures"}[wanted]:
        raise ValueError(
            f"{workdir} trained {kind} ({name!r}); use python -m wamjax.{command} "
            f"--workdir={workdir}"
        )


def check_training(config) -> None:
    """What a config must have right to train, and need not have to act; builds nothing.

    Raises:
      ValueError: names the key and the fix.
    """
    from wamjax.wam import builders

    builders.CHECKS.get(config.objective.name, lambda config: None)(config)
