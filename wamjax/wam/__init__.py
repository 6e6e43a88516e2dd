"""World action models: slots and roles, objectives and policies."""

from __future__ import annotations

# name -> where its `protocols.Method` is. Further ones are named where they are: MODULE:ATTRIBUTE.
METHODS = {
    "autoregressive": "wamjax.wam.video.builder:AUTOREGRESSIVE",
    "codec": "wamjax.wam.video.builder:CODEC",
    "cosmos_policy": "wamjax.wam.cosmos_policy.builder:METHOD",
    "denoising": "wamjax.wam.video.builder:DENOISING",
    "fast_wam": "wamjax.wam.fast_wam.builder:METHOD",
    "fast_wam_judge": "wamjax.wam.fast_wam.builder:JUDGED",
    "wan": "wamjax.wam.video.builder:WAN",
}


def method(name: str):
    """The `protocols.Method` of a name of `METHODS`, or of one's own as ``MODULE:ATTRIBUTE``.

    Raises:
      ValueError: there is none, with a suggestion.
    """
    from wamjax.named import find

    return find(name, METHODS, "config.objective.name")


def label(config) -> str:
    """What reports call the method of a config: its variant, where it has some."""
    name = config.objective.name
    return config.objective.variant if "objective.variant" in method(name).keys(config) else name


def build(config, spec):
    """Makes the objective that ``config.objective.name`` asks for.

    Args:
      config: the whole resolved config.
      spec: `wamjax.data.spec.DataSpec` of the data, for the sizes that data decides.

    Returns:
      a `protocols.Objective`.
    """
    return method(config.objective.name).build(config, spec)


def check_training(config) -> None:
    """What a config must have right to train, and need not have to act; builds nothing.

    Raises:
      ValueError: names the key and the fix; also of a key that is set and that nothing reads.
    """
    from wamjax import config as configs

    chosen, name = method(config.objective.name), config.objective.name
    patterns = chosen.keys(config)
    if unread := configs.unread(config, patterns):
        (key, (value, default)), more = next(iter(unread.items())), list(unread)[1:]
        others = [n for n in METHODS if n != name and not configs.unread(
            configs.only(config, key), method(n).keys(config))]  # fmt: skip
        why = f", {' and '.join(others)} would" if others else ""
        also = f"; nor are {', '.join(more)} read" if more else ""
        raise ValueError(
            f"config.{key} = {value!r} is set, and objective.name={name!r} as it is chosen does "
            f"not read it{why}: leave it at {default!r}{also}"
        )
    chosen.check(config)


def spec_of(values):
    """The spec of a run's data from its json in a checkpoint: of episodes, or of arrays.

    Returns:
      `wamjax.data.spec.DataSpec`, which has cameras, or `wamjax.data.arrays.ArraySpec`.
    """
    from wamjax.data.arrays import ArraySpec
    from wamjax.data.spec import DataSpec

    return (DataSpec if "cameras" in values else ArraySpec).from_json(values)


# kind of an objective -> (what it trains, the command that is for it).
KINDS = {
    "policy": ("a policy", "evaluate"),
    "pictures": ("a model of pictures", "sample"),
    "codec": ("a codec", "reconstruct"),
}


def check_kind(objective, name: str, workdir, wanted: str) -> None:
    """That a run trained what a command is for.

    Args:
      name: of the objective.
      wanted: a key of `KINDS`.

    Raises:
      ValueError: it trained something else; names the command that is for that.
    """
    if objective.kind != wanted:
        what, command = KINDS[objective.kind]
        raise ValueError(
            f"{workdir} trained {what} ({name!r}); use python -m wamjax.{command} "
            f"--workdir={workdir}"
        )
