"""Compiler flags for training on TPU, by chip, each with its reason.

They are passed as ``compiler_options`` of one compilation (TPU flags are strings), not through the
environment, so that a report can name what it was compiled with. The compiler rejects unknown
names, so compiling any program with them (`tests/tpu`, where libtpu is installed) checks the list.
Seen to be accepted and to have an effect with libtpu 0.0.42 on v5p, v5e and v6e; none was timed on
hardware.
"""

from __future__ import annotations

from typing import NamedTuple


class Flag(NamedTuple):
    """A flag, its value, and why it is set."""

    name: str
    value: str
    reason: str


# FSDP gathers the weights of the next layer while this one computes. Only fused into the
# computation ("collective fusion") does that really overlap.
OVERLAP = (
    Flag("xla_enable_async_all_gather", "true", "gathers may overlap; off by default on v6e"),
    Flag("xla_tpu_enable_async_collective_fusion", "true", "run collectives inside matmul fusions"),
    Flag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "weights of FSDP"),
    Flag("xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter", "true", "its gradients"),
    Flag(
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "true",
        "let one gather span several fusions, since no single matmul is long enough",
    ),
    Flag(
        "xla_tpu_overlap_compute_collective_tc",
        "true",
        "the tensor core computes while the network moves data",
    ),
)

# Without these each gradient shard is copied into another layout before it is reduced.
LAYOUT = (
    Flag(
        "xla_tpu_use_minor_sharding_for_major_trivial_input",
        "true",
        "shard stacked weights (layers, in, out) along a minor dimension without a relayout",
    ),
    Flag(
        "xla_tpu_relayout_group_size_threshold_for_reduce_scatter",
        "1",
        "choose the layout that suits reduce-scatter also for small groups of devices",
    ),
    Flag(
        "xla_tpu_assign_all_reduce_scatter_layout",
        "true",
        "let layout assignment know about the fused all-reduce and scatter",
    ),
)

# By the prefix of the topology's name (v5p:4x4x4).
CHIPS: dict[str, tuple[Flag, ...]] = {
    "v5p": OVERLAP + LAYOUT,
    "v5e": OVERLAP + LAYOUT,
    "v6e": OVERLAP + LAYOUT,
    "v4": (),  # not tried
    "tpu7x": (),  # not tried
}


def options(chip: str) -> dict[str, str]:
    """The flags of a chip as ``compiler_options``.

    Raises:
      KeyError: no list for this chip.
    """
    if chip not in CHIPS:
        raise KeyError(f"no flags for chip {chip!r}; there are lists for {sorted(CHIPS)}")
    return {flag.name: flag.value for flag in CHIPS[chip]}
