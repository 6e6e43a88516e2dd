"""Defines world action models: slots and roles, objectives and policies."""

from __future__ import annotations

# name -> location of its `protocols.Method`. A custom one is named by location: MODULE:ATTRIBUTE.
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
    """Returns the `protocols.Method` for a name in `METHODS`, or for a custom ``MODULE:ATTRIBUTE``.

    Raises:
      ValueError: the name is unknown; makes a suggestion.
    """
    from wamjax.named import find

    return find(name, METHODS, "config.objective.name")


def label(config) -> str:
    """Returns the name of a config's method for reports: its variant, if the method has
    variants."""
    name = config.objective.name
    return config.objective.variant if "objective.variant" in method(name).keys(config) else name


def build(config, spec):
    """Builds the objective that ``config.objective.name`` names.

    Args:
      config: the whole resolved config.
      spec: `wamjax.data.spec.DataSpec` of the data, for the sizes that depend on it.

    Returns:
      a `protocols.Objective`.
    """
    return method(config.objective.name).build(config, spec)


def check_training(config) -> None:
    """Checks what a config needs to train but not to act; builds nothing.

    Raises:
      ValueError: names the key and the fix; also if a key is set that nothing reads.
    """
    from wamjax import config as configs

    objective_method, name = method(config.objective.name), config.objective.name
    patterns = objective_method.keys(config)
    if unread := configs.unread(config, patterns):
        (key, (value, default)), remaining = next(iter(unread.items())), list(unread)[1:]
        others = [n for n in METHODS if n != name and not configs.unread(
            configs.only(config, key), method(n).keys(config))]  # fmt: skip
        verb = "read" if len(others) > 1 else "reads"
        hint = f" ({' and '.join(others)} {verb} it)" if others else ""
        suffix = f", and {', '.join(remaining)} at the default, too" if remaining else ""
        raise ValueError(
            f"config.{key} = {value!r} has no effect with objective.name={name!r} and the other "
            f"settings{hint}: leave it at {default!r}{suffix}"
        )
    objective_method.check(config)


def spec_of(values):
    """Returns the spec of a run's data from its JSON in a checkpoint, for episodes or arrays.

    Returns:
      `wamjax.data.spec.DataSpec`, which has cameras, or `wamjax.data.arrays.ArraySpec`.
    """
    from wamjax.data.arrays import ArraySpec
    from wamjax.data.spec import DataSpec

    return (DataSpec if "cameras" in values else ArraySpec).from_json(values)


# kind of objective -> (what it trains, the command for it).
KINDS = {
    "policy": ("a policy", "evaluate"),
    "pictures": ("a model of pictures", "sample"),
    "codec": ("a codec", "reconstruct"),
}


def check_kind(objective, name: str, workdir, wanted: str) -> None:
    """Checks that a command fits what a run trained.

    Args:
      name: name of the objective.
      wanted: a key of `KINDS`.

    Raises:
      ValueError: the run trained something else; names the right command.
    """
    if objective.kind != wanted:
        product, command = KINDS[objective.kind]
        raise ValueError(
            f"{workdir} trained {product} ({name!r}); use python -m wamjax.{command} "
            f"--workdir={workdir}"
        )
