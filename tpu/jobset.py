"""Prints the GKE manifest of a training on TPUs, or the commands around it; runs nothing.

    python tpu/jobset.py --name=libero --tpu=v6e --topology=4x4 --image=IMAGE -- \
        --config=experiments/configs/fast_wam_libero.py --workdir=gs://BUCKET/libero

Arguments after ``--`` go to `wamjax.train`. The manifest goes to standard output, for ``kubectl
apply -f -``. ``--print=pool`` prints the commands that create its node pools. ``--print=xpk``
prints the command that starts the same training with XPK, which needs no manifest.

Fields and machine names follow the documentation of GKE, JobSet and XPK; none of it has been tried
on a cluster.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import yaml

TEMPLATE = pathlib.Path(__file__).with_name("jobset.yaml")
STOPPED = 75  # exit status of a training stopped by a signal; with 0 the set would be complete
CHIPS = 4  # chips of a machine, except for machines with a single chip
NAME = 28  # maximum characters, since the names of pods are longer and have a limit


@dataclasses.dataclass(frozen=True)
class Tpu:
    """Describes a generation of TPUs in GKE's terms.

    Attributes:
      accelerator: value of its nodes' label.
      machine: machine type, without the number of chips.
      sides: number of sides of a topology, 2 or 3.
      type: XPK's type of a slice, without the number.
      cores: how much a chip counts in that number.
      single: whether there are machines with one chip.
      policy: whether a pool of several machines needs a workload policy instead of a topology.
    """

    accelerator: str
    machine: str
    sides: int
    type: str
    cores: int = 1
    single: bool = False
    policy: bool = False


TPUS = {
    "v4": Tpu("tpu-v4-podslice", "ct4p-hightpu", sides=3, type="v4", cores=2),
    "v5e": Tpu("tpu-v5-lite-podslice", "ct5lp-hightpu", sides=2, type="v5litepod", single=True),
    "v5p": Tpu("tpu-v5p-slice", "ct5p-hightpu", sides=3, type="v5p", cores=2),
    "v6e": Tpu("tpu-v6e-slice", "ct6e-standard", sides=2, type="v6e", single=True),
    "tpu7x": Tpu(
        "tpu7x", "tpu7x-standard", sides=3, type="tpu7x", cores=2, single=True, policy=True
    ),
}
PLANES = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
# Topologies of up to one cube; larger ones consist of cubes.
BLOCKS = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4))


@dataclasses.dataclass(frozen=True)
class Slice:
    """Describes the TPUs of one node pool.

    Attributes:
      tpu: a key of `TPUS`.
      topology: arrangement of the chips, e.g. 4x4x4.

    Raises:
      ValueError: there is no such slice.
    """

    tpu: str
    topology: str

    def __post_init__(self):
        if self.tpu not in TPUS:
            raise ValueError(f"--tpu={self.tpu}: one of {', '.join(TPUS)}")
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", self.topology):
            raise ValueError(f"--topology={self.topology}: numbers of chips, as 4x4 or 4x4x4")
        sides, kind = self._sides, TPUS[self.tpu]
        if len(sides) != kind.sides:
            raise ValueError(
                f"--topology={self.topology} has {len(sides)} sides, a {self.tpu} {kind.sides}"
            )
        some = PLANES if kind.sides == 2 else BLOCKS
        if kind.single:
            some = ((1,) * kind.sides, *some)
        cubes = kind.sides == 3 and all(side % 4 == 0 for side in sides)
        if sides not in some and not (cubes and list(sides) == sorted(sides)):
            names = ", ".join("x".join(map(str, sides)) for sides in some)
            more = ", or ascending multiples of 4" if kind.sides == 3 else ""
            raise ValueError(f"--topology={self.topology}: no slice of {self.tpu}; {names}{more}")

    @property
    def _sides(self) -> tuple[int, ...]:
        return tuple(int(side) for side in self.topology.split("x"))

    @property
    def chips(self) -> int:
        """Returns the number of chips of the slice."""
        return math.prod(self._sides)

    @property
    def chips_per_host(self) -> int:
        """Returns the number of chips of one machine."""
        return min(self.chips, CHIPS)

    @property
    def hosts(self) -> int:
        """Returns the number of machines of the slice."""
        return self.chips // self.chips_per_host

    @property
    def machine(self) -> str:
        """Returns the machine type."""
        return f"{TPUS[self.tpu].machine}-{self.chips_per_host}t"

    @property
    def type(self) -> str:
        """Returns XPK's type of the slice, which counts cores in some generations."""
        kind = TPUS[self.tpu]
        return f"{kind.type}-{self.chips * kind.cores}"


def command(train: Sequence[str]) -> list[str]:
    """Returns the command of every process.

    Args:
      train: flags of `wamjax.train`.

    Raises:
      ValueError: --config or --workdir is missing, or not all pods see the folder.
    """
    given = dict(word.removeprefix("--").partition("=")[::2] for word in train)
    if not given.get("config"):
        raise ValueError("no --config=FILE behind --")
    if not given.get("workdir", "").startswith("gs://"):
        was = f"--workdir={given['workdir']} is a folder of each pod" if "workdir" in given else (
            "no --workdir behind --"
        )  # fmt: skip
        raise ValueError(f"{was}: --workdir=gs://BUCKET/RUN")
    own = ["--distributed", f"--stopped_status={STOPPED}"]
    return ["python", "-m", "wamjax.train", *train, *own]


def manifest(
    name: str,
    of: Slice,
    image: str,
    train: Sequence[str],
    slices: int = 1,
    spot: bool = False,
    grace: int = 120,
    max_restarts: int = 50,
) -> dict[str, Any]:
    """Fills in `TEMPLATE`.

    Args:
      name: name of the JobSet.
      of: one of the slices.
      image: image of `tpu/Dockerfile`, in a registry that the cluster can read.
      train: flags of `wamjax.train`.
      slices: number of slices.
      spot: whether to use nodes that may be preempted.
      grace: seconds from SIGTERM to SIGKILL, within which a checkpoint must be written.
      max_restarts: maximum restarts of the whole set.

    Raises:
      ValueError: no cluster would accept a value, or `command` rejects the flags.
    """
    check_name(name)
    for key, value in dict(slices=slices, grace=grace).items():
        if value < 1:
            raise ValueError(f"--{key}={value} is below 1")
    jobset = copy.deepcopy(yaml.safe_load(TEMPLATE.read_text()))
    jobset["metadata"]["name"] = name
    jobset["spec"]["failurePolicy"]["maxRestarts"] = max_restarts
    (jobs,) = jobset["spec"]["replicatedJobs"]
    jobs["replicas"] = slices
    job = jobs["template"]["spec"]
    job["parallelism"] = job["completions"] = of.hosts
    pod = job["template"]["spec"]
    pod["terminationGracePeriodSeconds"] = grace
    pod["nodeSelector"] = {
        "cloud.google.com/gke-tpu-accelerator": TPUS[of.tpu].accelerator,
        "cloud.google.com/gke-tpu-topology": of.topology,
    }
    if spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true",
             "effect": "NoSchedule"}
        ]  # fmt: skip
    (container,) = pod["containers"]
    container["image"] = image
    container["resources"] = {"limits": {"google.com/tpu": of.chips_per_host}}
    # Kubernetes would substitute variables for $(NAME).
    container["command"] = [word.replace("$(", "$$(") for word in command(train)]
    return jobset


def check_name(name: str) -> None:
    """Checks the name of a JobSet.

    Raises:
      ValueError: Kubernetes would reject the name, or the longer names derived from it.
    """
    if len(name) > NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise ValueError(f"--name={name}: lower case, digits and -, up to {NAME} characters")


def pools(name: str, of: Slice, cluster: str, slices: int = 1, spot: bool = False) -> list[str]:
    """Returns the commands that create the node pools, one per slice.

    The user fills in REGION and ZONE.
    """
    lines, place = [], []
    if of.hosts > 1 and TPUS[of.tpu].policy:
        lines.append(
            f"gcloud compute resource-policies create workload-policy {name} "
            f"--type=HIGH_THROUGHPUT --accelerator-topology={of.topology} --region=REGION"
        )
        place = [f"--placement-policy={name}"]
    elif of.hosts > 1:
        place = [f"--tpu-topology={of.topology}"]
    for i in range(slices):
        words = [
            "gcloud", "container", "node-pools", "create", f"{name}-{i}", f"--cluster={cluster}",
            "--location=REGION", "--node-locations=ZONE", f"--machine-type={of.machine}", *place,
            f"--num-nodes={of.hosts}", *(["--spot"] if spot else []),
        ]  # fmt: skip
        lines.append(shlex.join(words))
    return lines


def xpk(
    name: str,
    of: Slice,
    image: str,
    train: Sequence[str],
    cluster: str,
    slices: int = 1,
    spot: bool = False,
    max_restarts: int = 50,
) -> str:
    """Returns the command that starts the same training by XPK; arguments as for `manifest`."""
    check_name(name)
    words = [
        "xpk", "workload", "create", f"--cluster={cluster}", f"--workload={name}",
        f"--tpu-type={of.type}", f"--num-slices={slices}", f"--docker-image={image}",
        f"--max-restarts={max_restarts}", *(["--spot"] if spot else []),
        f"--command={shlex.join(command(train))}",
    ]  # fmt: skip
    return shlex.join(words)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the script's flags; those of the training follow ``--``."""
    out = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    out.add_argument("--name", required=True, help="name of the JobSet")
    out.add_argument("--tpu", required=True, help=", ".join(TPUS))
    out.add_argument("--topology", required=True, help="chips of a slice, e.g. 4x4x4")
    out.add_argument("--image", help="image of tpu/Dockerfile in a registry")
    out.add_argument("--slices", type=int, default=1, help="number of slices in one training")
    out.add_argument("--spot", action="store_true", help="use nodes that may be preempted")
    out.add_argument("--grace", type=int, default=120, help="seconds to save after SIGTERM")
    out.add_argument("--max_restarts", type=int, default=50, help="restarts of the whole set")
    out.add_argument("--cluster", help="cluster name for pool and xpk")
    out.add_argument("--print", default="manifest", choices=("manifest", "pool", "xpk"))
    out.add_argument("train", nargs="*", help="after --: flags of wamjax.train")
    return out


def render(argv: Sequence[str]) -> str:
    """Returns what the command prints.

    Raises:
      ValueError: see `manifest` and `Slice`; or the requested output needs a missing flag.
    """
    given = parser().parse_args(argv)
    if given.print != "manifest" and not given.cluster:
        raise ValueError(f"no --cluster=CLUSTER, which --print={given.print} names")
    if given.print != "pool" and not given.image:
        raise ValueError("no --image=IMAGE of tpu/Dockerfile")
    of = Slice(given.tpu, given.topology)
    shared = dict(slices=given.slices, spot=given.spot)
    if given.print == "pool":
        check_name(given.name)
        return "\n".join(pools(given.name, of, cluster=given.cluster, **shared)) + "\n"
    shared |= dict(max_restarts=given.max_restarts)
    if given.print == "xpk":
        return xpk(given.name, of, given.image, given.train, cluster=given.cluster, **shared) + "\n"
    filled = manifest(given.name, of, given.image, given.train, grace=given.grace, **shared)
    return yaml.safe_dump(filled, sort_keys=False, width=1000)


def main() -> None:
    """Prints the output, or one line that says what is wrong."""
    try:
        print(render(sys.argv[1:]), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
