"""Tests launchers without a cluster: what they print, and what they do with fake commands.

With the fake gcloud, every worker is a folder, in which its commands run.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import types

import jax
import jobset
import pytest
import yaml
from test_docs_commands import parse

from wamjax import train

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "tpu" / "launch.sh"
SLURM = ROOT / "tpu" / "slurm.sbatch"
CONFIG = "--config=experiments/configs/quickstart.py"
# Arguments that a shell would split or expand.
HARD = [CONFIG, "--config.run_name=a, b's \"c\" $HOME (d)", "--workdir=gs://bucket/run"]
SLICE = ["--name=pod", "--zone=zone-a", "--type=v6e-8"]
OWN = ["--distributed", "--stopped_status=75"]

# Stands in for a training: stores its arguments, and exits as configured, or on SIGTERM as saved.
TRAINING = """\
#!/bin/bash
printf '%s\\0' "$@" >> "$HOME/arguments"
trap 'sleep 0.2; echo saved >> "$HOME/saved"; exit 75' TERM
while [ ! -f "$HOME/end" ]; do sleep 0.1; done
exit "$(cat "$HOME/end")"
"""
# Fakes a worker's installer.
PYTHON3 = """\
#!/bin/bash
echo "$@" >> "$HOME/installed"
if [ "$2 $3" = "uv venv" ]; then
  for folder; do :; done
  mkdir -p "$folder/bin" && cp "$CLOUD/training" "$folder/bin/python"
fi
"""
GCLOUD = """\
import json, os, pathlib, shutil, subprocess, sys
cloud = pathlib.Path(os.environ["CLOUD"])
words = sys.argv[1:]
with (cloud / "calls").open("a") as file:
    file.write(json.dumps(words) + "\\n")
given = dict(w[2:].split("=", 1) for w in words if w.startswith("--") and "=" in w)
group, verb, what = words[2:5]
state = cloud / "state"
states = state.read_text().split() if state.exists() else []
if group == "queued-resources":
    if verb == "describe":
        if (cloud / "offline").exists():
            sys.exit("ERROR: no route to host")
        if not states:
            sys.exit(f"ERROR: NOT_FOUND: Resource {what} was not found")
        print(states[0])
        state.write_text(" ".join(states[1:] or states))
    elif verb == "create":
        assert not states, "it is there"
        state.write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
        count = int(given.get("node-count", 0))
        for node in [f"{given['node-prefix']}-{i}" for i in range(count)] or [given["node-id"]]:
            for worker in "01":
                (cloud / node / worker).mkdir(parents=True)
    elif verb == "delete":
        assert states, "it is not there"
        state.unlink()
        for folder in [p for p in cloud.iterdir() if p.name.startswith(what)]:
            shutil.rmtree(folder)
    sys.exit()
if states != ["ACTIVE"]:
    sys.exit(255)
node = what.partition(":")[0] if verb == "ssh" else words[5].partition(":")[0]
for home in sorted((cloud / node).iterdir()):
    if given["worker"] not in ("all", home.name):
        continue
    if verb == "scp":
        shutil.copy(what, home / words[5].partition(":")[2])
    else:
        env = os.environ | {"HOME": str(home), "PATH": f"{cloud}/remote:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", given["command"]], cwd=home, env=env)
        if done.returncode:
            sys.exit(done.returncode)
"""


def script(path, text, interpreter=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{interpreter}\n{text}" if interpreter else text)
    path.chmod(0o755)
    return path


def until(condition, seconds=120):
    """Waits until `condition` is true and returns it; the limit only catches hangs."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
    return value


def read(path):
    return path.read_text() if path.exists() else ""


# ---- scripts as text ----


@pytest.mark.parametrize("path", [LAUNCH, SLURM], ids=lambda p: p.name)
def test_scripts_are_valid_shell(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Returns an environment with only standard commands on its path, without gcloud."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("bash", "dirname", "sed"):
        (folder / name).symlink_to(shutil.which(name))
    return {"PATH": str(folder), "HOME": "/nowhere"}


def dry(bare, verb, *words, settings=SLICE, env=None):
    """Returns the commands that a verb prints, split, without comments."""
    command = ["bash", str(LAUNCH), verb, *settings, "--dry-run", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=bare | (env or {}))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return [shlex.split(line) for line in lines if not line.startswith("#")]


def kinds(commands):
    return [c[3] + " " + c[4] if c[0] == "gcloud" else c[0] for c in commands]


MAKE = ["queued-resources describe", "queued-resources delete", "queued-resources create"]
INSTALL = ["git", "tpu-vm ssh", "tpu-vm scp", "tpu-vm ssh"]
FLAGS = ["--", *HARD]


@pytest.mark.parametrize("verb, words, want", [
    ("setup", [], MAKE + INSTALL),
    ("run", FLAGS, ["tpu-vm ssh"]),
    ("resume", FLAGS, [*MAKE, *INSTALL, "tpu-vm ssh"]),
    ("keep", FLAGS, [*MAKE, *INSTALL, "tpu-vm ssh", "tpu-vm ssh"]),
    ("tail", [], ["tpu-vm ssh"]),
    ("status", [], ["tpu-vm ssh"]),
    ("stop", [], ["tpu-vm ssh"]),
    ("delete", [], ["queued-resources delete"]),
])  # fmt: skip
def test_a_dry_run_prints_every_command_in_order(bare, verb, words, want):
    commands = dry(bare, verb, *words)
    assert kinds(commands) == want
    assert all("--zone=zone-a" in c for c in commands if c[0] == "gcloud")


def sent(commands):
    """Returns the commands that workers run, split by their shell."""
    found = [w.partition("=")[2] for c in commands for w in c if w.startswith("--command=")]
    return [shlex.split(command) for command in found]


def test_training_flags_are_passed_on_unchanged(bare):
    *_, command = sent(dry(bare, "run", *FLAGS))
    assert command == ["bash", "wamjax/tpu/launch.sh", "worker_run", *HARD, *OWN]


def test_settings_become_flags_of_gcloud(bare):
    spot = ["--spot", "--slices=2", "--project=p", "--type=v5p-64"]
    commands = dry(bare, "setup", settings=["--name=pod", "--zone=zone-a", *spot])
    create = next(c for c in commands if "create" in c)
    assert create[3:] == [
        "queued-resources", "create", "pod", "--accelerator-type=v5p-64",
        "--runtime-version=v2-alpha-tpuv5", "--node-count=2", "--node-prefix=pod", "--spot",
        "--zone=zone-a", "--project=p",
    ]  # fmt: skip
    assert [c[5] for c in commands if "ssh" in c] == ["pod-0", "pod-0", "pod-1", "pod-1"]
    runtimes = {"v6e-16": "v2-alpha-tpuv6e", "v5litepod-16": "v2-alpha-tpuv5-lite",
                "v4-32": "tpu-ubuntu2204-base"}  # fmt: skip
    for kind, runtime in runtimes.items():
        env = {"WAMJAX_NAME": "pod", "WAMJAX_ZONE": "z", "WAMJAX_TYPE": kind}
        create = next(c for c in dry(bare, "setup", settings=[], env=env) if "create" in c)
        assert f"--runtime-version={runtime}" in create and "--node-id=pod" in create
    assert "--worker=3" in dry(bare, "tail", settings=[*SLICE, "--worker=3"])[0]


@pytest.mark.parametrize("words, text", [
    (["fly", *SLICE], "fly is no verb: one of setup run"),
    (["setup", "--zone=z", "--type=v6e-8"], "--name=NAME or WAMJAX_NAME"),
    (["setup", "--name=a", "--type=v6e-8"], "--zone=ZONE or WAMJAX_ZONE"),
    (["setup", "--name=a", "--zone=z"], "--type=TYPE or WAMJAX_TYPE"),
    (["setup", "--name=A_b", "--zone=z"], "--name=A_b: lower case"),
    (["setup", "--name=a", "--zone=z", "--type=tpu7x-128"], "tpu/jobset.py"),
    (["setup", "--name=a", "--zone=z", "--type=v9-8"], "give --version too"),
    (["setup", *SLICE, "--slices=none"], "--slices=none"),
    (["setup", *SLICE, "--spot", "--reserved"], "exclude one another"),
    (["setup", *SLICE, "--sport"], "--sport is no setting"),
    (["run", *SLICE, "--", "--workdir=gs://b/r"], "no --config=FILE"),
    (["run", *SLICE, "--", CONFIG], "no --workdir=gs://BUCKET/RUN"),
    (["run", *SLICE, "--", CONFIG, "--workdir=runs/a"], "another folder on every worker"),
    (["stop", *SLICE, "--", CONFIG], "stop takes no flags of the training"),
    (["status", *SLICE], "gcloud is not installed"),
])  # fmt: skip
def test_missing_settings_are_one_line_errors(bare, words, text):
    command = ["bash", str(LAUNCH), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=bare)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


# ---- actions of the launcher ----


class Cloud:
    """Fakes a repository with the launcher, and a gcloud with one zone."""

    def __init__(self, folder):
        self.folder, self.repository = folder / "cloud", folder / "repository"
        self.processes = []
        script(self.folder / "bin" / "gcloud", GCLOUD, f"{sys.executable} -SE")
        script(self.folder / "remote" / "python3", PYTHON3)
        script(self.folder / "training", TRAINING)
        person = {f"GIT_{who}_{what}": f"{what}@x".lower()
                  for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}  # fmt: skip
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        self.env = os.environ | person | {"CLOUD": str(self.folder), "PATH": path}
        script(self.repository / "tpu" / "launch.sh", LAUNCH.read_text())
        (self.repository / "code.txt").write_text("committed")
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
            subprocess.run(["git", *words], cwd=self.repository, env=self.env, check=True)

    def start(self, verb, *words, settings=SLICE):
        own = ["bash", str(self.repository / "tpu" / "launch.sh"), verb, *settings]
        process = subprocess.Popen([*own, "--poll=0.2", *words], env=self.env, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        self.processes.append(process)
        return process

    def launch(self, verb, *words, settings=SLICE, status=0):
        process = self.start(verb, *words, settings=settings)
        out, said = process.communicate(timeout=120)
        assert process.returncode == status, said
        return out, said

    def calls(self):
        """Returns the calls of gcloud, without queries of the state."""
        lines = [json.loads(line) for line in read(self.folder / "calls").splitlines()]
        (self.folder / "calls").unlink()
        return [f"{c[2]} {c[3]}" for c in lines if c[3] != "describe"]

    def home(self, worker=0, node="pod"):
        return self.folder / node / str(worker)

    def arguments(self, **where):
        """Returns the arguments of the trainings started on a worker."""
        words = read(self.home(**where) / "arguments").split("\0")[:-1]
        starts = [i for i, word in enumerate(words) if word == "-m"] + [len(words)]
        return [words[a:b] for a, b in zip(starts, starts[1:], strict=False)]

    def pid(self, worker=0):
        return int(until(lambda: read(self.home(worker) / "wamjax-run" / "pid")))

    def end(self, status):
        for worker in (0, 1):
            (self.home(worker) / "end").write_text(status)

    def close(self):
        for process in self.processes:
            process.kill()
        for path in self.folder.glob("*/*/wamjax-run/pid"):
            if not (path.parent / "status").exists():
                try:
                    os.kill(int(path.read_text()), signal.SIGKILL)
                except ProcessLookupError:
                    pass


@pytest.fixture
def cloud(tmp_path):
    out = Cloud(tmp_path)
    yield out
    out.close()


def test_set_up_run_stop_resume_delete(cloud):
    (cloud.repository / "code.txt").write_text("changed, not committed")
    cloud.launch("setup")
    assert cloud.calls() == [
        "queued-resources create", "tpu-vm ssh", "tpu-vm scp", "tpu-vm ssh"
    ]  # fmt: skip
    for worker in (0, 1):
        home = cloud.home(worker)
        assert (home / "wamjax" / "code.txt").read_text() == "changed, not committed"
        assert f"--editable {home}/wamjax[tpu,gcs]" in read(home / "installed")
    assert cloud.launch("status")[0] == "none\n"

    cloud.launch("run", *FLAGS)
    want = ["-m", "wamjax.train", *HARD, *OWN]
    assert until(lambda: cloud.arguments(worker=1)) == [want]
    assert until(lambda: cloud.arguments(worker=0)) == [want]
    assert cloud.launch("status")[0] == "running\n"
    _, said = cloud.launch("run", *FLAGS, status=2)
    assert "stop it first" in said

    out, _ = cloud.launch("stop")  # returns once the training is saved
    assert out == "stopped\nstopped\n"
    assert all(read(cloud.home(worker) / "saved") == "saved\n" for worker in (0, 1))
    assert cloud.launch("stop")[0] == "no training runs here\n" * 2

    cloud.calls()
    cloud.launch("resume", *FLAGS)  # the slice exists: nothing is created or installed
    assert cloud.calls() == ["tpu-vm ssh"]
    assert until(lambda: cloud.arguments()[1:]) == [want]
    cloud.end("0")
    until(lambda: cloud.launch("status")[0] == "done\n")
    cloud.launch("delete")
    assert not cloud.home().exists()


def test_keep_recreates_a_preempted_slice_and_restarts_the_training(cloud):
    process = cloud.start("keep", *FLAGS, settings=[*SLICE, "--spot"])
    until(lambda: cloud.arguments(worker=1))
    os.kill(cloud.pid(), signal.SIGTERM)  # as before maintenance: saved, and started again
    until(lambda: len(cloud.arguments(worker=0)) == 2 or process.poll() is not None)
    (cloud.folder / "offline").touch()  # an unreachable slice does not count as gone
    time.sleep(0.3)
    (cloud.folder / "state").write_text("SUSPENDED")
    for worker in (0, 1):
        os.kill(cloud.pid(worker), signal.SIGKILL)
    assert cloud.home().exists()
    (cloud.folder / "offline").unlink()
    until(lambda: read(cloud.folder / "calls").count('"create"') == 2)
    until(lambda: cloud.arguments(worker=1))
    assert cloud.arguments(worker=0) == [["-m", "wamjax.train", *HARD, *OWN]]
    cloud.end("0")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0 and "done: gs://bucket/run" in said
    calls = cloud.calls()
    made = [i for i, c in enumerate(calls) if c == "queued-resources create"]
    assert len(made) == 2 and calls.count("queued-resources delete") == 1
    assert calls[made[1] - 1] == "queued-resources delete"
    install = ["tpu-vm ssh", "tpu-vm scp", "tpu-vm ssh"]
    assert all(calls[i + 1 : i + 4] == install for i in made)


@pytest.mark.parametrize("status, text", [
    ("2", "asked for what cannot be"), ("1", "failed 2 times (failed 1)"),
])  # fmt: skip
def test_keep_gives_up_on_repeated_failures(cloud, status, text):
    process = cloud.start("keep", *FLAGS, settings=[*SLICE, "--retries=1"])
    until(lambda: cloud.arguments(worker=1))
    cloud.end(status)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2 and text in said


def test_keep_does_not_restart_what_the_user_stopped(cloud):
    process = cloud.start("keep", *FLAGS)
    until(lambda: cloud.arguments(worker=1))
    cloud.launch("stop")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped by hand" in said
    assert len(cloud.arguments()) == 1


def test_several_slices_run_the_same_command(cloud):
    settings = [*SLICE, "--slices=2"]
    cloud.launch("resume", *FLAGS, settings=settings)
    for node in ("pod-0", "pod-1"):
        for worker in (0, 1):
            found = until(lambda n=node, w=worker: cloud.arguments(node=n, worker=w))
            assert found == [["-m", "wamjax.train", *HARD, *OWN]]
    assert cloud.launch("stop", settings=settings)[0] == "stopped\n" * 4


# ---- the manifest ----


def render(*words):
    return yaml.safe_load(jobset.render([*words, "--image=registry/wamjax:1", "--", *HARD]))


@pytest.mark.parametrize("tpu, topology, slices, hosts, chips, accelerator", [
    ("v6e", "4x4", 1, 4, 4, "tpu-v6e-slice"),
    ("v6e", "1x1", 1, 1, 1, "tpu-v6e-slice"),
    ("v6e", "16x16", 2, 64, 4, "tpu-v6e-slice"),
    ("v5e", "2x2", 1, 1, 4, "tpu-v5-lite-podslice"),
    ("v5p", "4x4x4", 1, 16, 4, "tpu-v5p-slice"),
    ("v5p", "2x2x1", 3, 1, 4, "tpu-v5p-slice"),
    ("v4", "4x4x8", 1, 32, 4, "tpu-v4-podslice"),
    ("tpu7x", "2x2x1", 1, 1, 4, "tpu7x"),
    ("tpu7x", "4x4x4", 2, 16, 4, "tpu7x"),
])  # fmt: skip
def test_the_manifest_has_the_fields_that_matter(tpu, topology, slices, hosts, chips, accelerator):
    out = render("--name=run", f"--tpu={tpu}", f"--topology={topology}", f"--slices={slices}")
    assert (out["apiVersion"], out["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert out["metadata"]["name"] == "run"
    key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert out["metadata"]["annotations"] == {key: "cloud.google.com/gke-nodepool"}
    (jobs,) = out["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert jobs["replicas"] == slices
    assert job["parallelism"] == job["completions"] == hosts and job["completionMode"] == "Indexed"
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": accelerator,
                                   "cloud.google.com/gke-tpu-topology": topology}  # fmt: skip
    # Any process that ends restarts all, except after a usage error.
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    wrong = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert rule == {"action": "FailJob", "onExitCodes": wrong}
    assert out["spec"]["failurePolicy"] == {
        "maxRestarts": 50,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    assert pod["hostNetwork"] and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert pod["shareProcessNamespace"] and pod["terminationGracePeriodSeconds"] == 120
    assert container["securityContext"] == {"privileged": True}
    assert {p["containerPort"] for p in container["ports"]} == {8471, 8080}
    assert container["image"] == "registry/wamjax:1" and "args" not in container
    assert container["command"] == ["python", "-m", "wamjax.train", *HARD, *OWN]


def test_settings_of_the_manifest():
    out = render("--name=run", "--tpu=v6e", "--topology=4x4", "--spot", "--grace=30",
                 "--max_restarts=3")  # fmt: skip
    (jobs,) = out["spec"]["replicatedJobs"]
    pod = jobs["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert [t["key"] for t in pod["tolerations"]] == ["cloud.google.com/gke-spot"]
    assert pod["terminationGracePeriodSeconds"] == 30
    assert out["spec"]["failurePolicy"]["maxRestarts"] == 3


def test_the_example_manifest_is_generated_from_its_own_values():
    of = jobset.Slice("v6e", "4x4")
    flags = ["--config=experiments/configs/fast_wam_libero.py", "--workdir=gs://BUCKET/run"]
    whole = yaml.safe_load(jobset.TEMPLATE.read_text())
    assert jobset.manifest("wamjax", of, "IMAGE", flags) == whole


def test_kubernetes_substitutes_no_variables():
    of = jobset.Slice("v6e", "4x4")
    out = jobset.manifest("run", of, "i", [*HARD[::2], "--config.run_name=$(NAME)"])
    job = out["spec"]["replicatedJobs"][0]["template"]["spec"]
    command = job["template"]["spec"]["containers"][0]["command"]
    assert "--config.run_name=$$(NAME)" in command


@pytest.mark.parametrize("tpu, topology, kind", [
    ("v5p", "2x4x4", "v5p-64"), ("v6e", "4x4", "v6e-16"), ("tpu7x", "4x4x4", "tpu7x-128"),
    ("v5e", "4x4", "v5litepod-16"), ("v4", "2x2x4", "v4-32"),
])  # fmt: skip
def test_the_command_of_xpk(tpu, topology, kind):
    words = shlex.split(jobset.render([
        "--name=run", f"--tpu={tpu}", f"--topology={topology}", "--image=i:1", "--print=xpk",
        "--cluster=c", "--slices=2", "--spot", "--", *HARD,
    ]))  # fmt: skip
    assert words[:3] == ["xpk", "workload", "create"] and "--spot" in words
    given = dict(w[2:].split("=", 1) for w in words if "=" in w)
    assert given["tpu-type"] == kind and given["num-slices"] == "2"
    assert given["workload"] == "run" and given["cluster"] == "c" and given["docker-image"] == "i:1"
    assert shlex.split(given["command"]) == ["python", "-m", "wamjax.train", *HARD, *OWN]


def test_the_commands_of_node_pools():
    def pools(*words):
        text = jobset.render([*words, "--name=run", "--print=pool", "--cluster=c"])
        return [shlex.split(line) for line in text.splitlines()]

    first, second = pools("--tpu=v6e", "--topology=4x4", "--slices=2", "--spot")
    assert first[:5] == ["gcloud", "container", "node-pools", "create", "run-0"]
    assert second[4] == "run-1" and first[5:] == second[5:]
    assert {"--machine-type=ct6e-standard-4t", "--tpu-topology=4x4", "--num-nodes=4",
            "--spot"} <= set(first)  # fmt: skip
    # A workload policy places its machines.
    policy, pool = pools("--tpu=tpu7x", "--topology=2x4x4")
    assert {"workload-policy", "--accelerator-topology=2x4x4"} <= set(policy)
    assert {"--machine-type=tpu7x-standard-4t", "--placement-policy=run",
            "--num-nodes=8"} <= set(pool)  # fmt: skip
    assert not any("topology" in word for word in pool)
    (pool,) = pools("--tpu=tpu7x", "--topology=1x1x1")
    assert {"--machine-type=tpu7x-standard-1t", "--num-nodes=1"} <= set(pool)


@pytest.mark.parametrize("words, text", [
    (["--tpu=v9", "--topology=4x4"], "one of v4, v5e, v5p, v6e, tpu7x"),
    (["--tpu=v6e", "--topology=4x4x4"], "has 3 sides, a v6e 2"),
    (["--tpu=v6e", "--topology=3x4"], "no slice of v6e"),
    (["--tpu=v5p", "--topology=4x4x6"], "ascending multiples of 4"),
    (["--tpu=v5p", "--topology=1x1x1"], "no slice of v5p"),
    (["--tpu=v6e", "--topology=four"], "numbers of chips"),
    (["--tpu=v6e", "--topology=4x4", "--name=Run"], "--name=Run: lower case"),
    (["--tpu=v6e", "--topology=4x4", f"--name={'a' * 29}"], "up to 28 characters"),
    (["--tpu=v6e", "--topology=4x4", "--slices=0"], "--slices=0 is below 1"),
    (["--tpu=v6e", "--topology=4x4", "--print=xpk"], "no --cluster"),
    (["--tpu=v6e", "--topology=4x4", "--image="], "no --image"),
    (["--tpu=v6e", "--topology=4x4", "--", CONFIG, "--workdir=/runs/a"], "folder of each pod"),
    (["--tpu=v6e", "--topology=4x4", "--", CONFIG], "no --workdir behind"),
    (["--tpu=v6e", "--topology=4x4", "--", "--workdir=gs://b/r"], "no --config"),
])  # fmt: skip
def test_invalid_manifest_values_are_errors(words, text):
    flags = [] if "--" in words else FLAGS
    with pytest.raises(ValueError, match=re.escape(text)):
        jobset.render(["--name=run", "--image=i", *words, *flags])


def test_the_script_reports_errors_in_one_line():
    command = [sys.executable, str(ROOT / "tpu" / "jobset.py"), "--name=run", "--tpu=v9"]
    done = subprocess.run([*command, "--topology=4x4", "--image=i"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: --tpu=v9: one of v4, v5e, v5p, v6e, tpu7x\n"


# ---- Slurm ----

# Fakes srun on two nodes with a process each; forwards signals to both, and returns the highest
# exit status.
SRUN = """\
#!/bin/bash
printf '%s\\0' "$@" > "$CLUSTER/srun"
while [ "$1" != bash ]; do shift; done
for i in 0 1; do
  mkdir -p "$CLUSTER/$i"
  HOME=$CLUSTER/$i SLURM_PROCID=$i "$@" & processes="$processes $!"
done
trap 'kill -TERM $processes' TERM
worst=0
for process in $processes; do
  while :; do
    wait "$process"; status=$?
    kill -0 "$process" 2>/dev/null || break
  done
  [ "$status" -gt "$worst" ] && worst=$status
done
exit "$worst"
"""
SCONTROL = """\
#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then echo node07 && sleep 0.1 && echo node09; exit; fi
echo "$@" >> "$CLUSTER/scontrol"
"""


class Cluster:
    """Fakes two nodes with a GPU each, and the environment of a Slurm job."""

    def __init__(self, folder):
        self.folder = folder
        script(folder / "bin" / "srun", SRUN)
        script(folder / "bin" / "scontrol", SCONTROL)
        script(folder / "bin" / "squeue", '#!/bin/bash\ncat "$CLUSTER/state"\n')
        self.state("RUNNING")
        self.env = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CLUSTER": str(folder),
            "PYTHON": str(script(folder / "training", TRAINING)), "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[07,09]", "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "1",
        }  # fmt: skip

    def state(self, text):
        (self.folder / "state").write_text(text)

    def submit(self, *words, **env):
        return subprocess.Popen(["bash", str(SLURM), *words], env=self.env | env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def words(self, process):
        text = until(lambda: read(self.folder / str(process) / "arguments"))
        return text.split("\0")[:-1]


@pytest.fixture
def cluster(tmp_path):
    yield Cluster(tmp_path)
    for i in (0, 1):  # end leftover processes
        if (tmp_path / str(i)).exists():
            (tmp_path / str(i) / "end").write_text("1")


def slurm_words(process):
    port = 10000 + 4711
    return ["-m", "wamjax.train", *HARD, "--distributed", f"--coordinator=node07:{port}",
            "--processes=2", f"--process={process}", "--stopped_status=75"]  # fmt: skip


def test_slurm_starts_one_process_on_every_gpu(cluster):
    process = cluster.submit(*HARD)
    assert [cluster.words(i) for i in (0, 1)] == [slurm_words(i) for i in (0, 1)]
    options = read(cluster.folder / "srun").split("\0")
    assert {"--gpu-bind=none", "--kill-on-bad-exit=0"} <= set(options[:2])
    for i in (0, 1):
        (cluster.folder / str(i) / "end").write_text("0")
    process.communicate(timeout=120)
    assert process.returncode == 0 and not read(cluster.folder / "scontrol")


@pytest.mark.parametrize("state, want", [("RUNNING", "requeue 4711\n"), ("COMPLETING", "")])
def test_before_its_time_limit_a_slurm_job_saves_and_requeues(cluster, state, want):
    """Unless the job was cancelled."""
    process = cluster.submit(*HARD)
    for i in (0, 1):
        cluster.words(i)
    cluster.state(state)
    time.sleep(0.2)  # until the fake has set its trap
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert [read(cluster.folder / str(i) / "saved") for i in (0, 1)] == ["saved\n"] * 2
    assert read(cluster.folder / "scontrol") == want


def test_slurm_does_not_requeue_failed_or_cancelled_jobs(cluster):
    process = cluster.submit(*HARD)
    for i in (0, 1):
        cluster.words(i)
        (cluster.folder / str(i) / "end").write_text("75" if i else "0")
    process.communicate(timeout=120)
    assert process.returncode == 75 and not read(cluster.folder / "scontrol")


@pytest.mark.parametrize("words, env, text", [
    (HARD, {"SLURM_JOB_ID": ""}, "not in a job of Slurm"),
    (HARD[1:], {}, "no --config=FILE"),
    (HARD[:1], {}, "no --workdir=DIR"),
    (HARD, {"SLURM_GPUS_ON_NODE": "8"}, "1 processes and 8 GPUs on a node"),
])  # fmt: skip
def test_missing_slurm_settings_are_named(cluster, words, env, text):
    process = cluster.submit(*words, **env)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2 and text in said and said.count("\n") == 1


def test_slurm_jobs_ask_for_a_signal_and_allow_requeueing():
    options = re.findall(r"^#SBATCH --(\S+)", SLURM.read_text(), re.M)
    assert {"signal=B:TERM@120", "requeue", "open-mode=append"} <= set(options)
    given = dict(option.split("=", 1) for option in options if "=" in option)
    assert given["ntasks-per-node"] == given["gpus-per-node"]


# ---- the image ----


def test_the_image_contains_what_training_needs():
    text = (ROOT / "tpu" / "Dockerfile").read_text().replace("\\\n", " ")
    sources = [w for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for w in line.split()]
    kept = read(ROOT / "tpu" / "Dockerfile.dockerignore").split()
    assert all((ROOT / s).exists() and f"!{s}" in kept for s in sources) and kept[0] == "*"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"], "pyproject.toml", "wamjax",
            "experiments"} == set(sources)  # fmt: skip
    assert re.search(r"^ARG EXTRA=tpu$", text, re.M) and ".[${EXTRA},gcs]" in text
    assert {"tpu", "cuda", "gcs"} <= set(project["optional-dependencies"])
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.M)[1])
    assert entry == ["python", "-m", "wamjax.train"]


# ---- the training ----


def test_every_launcher_gives_flags_that_the_training_has(bare):
    config = [CONFIG, "--config.total_steps=3", "--workdir=gs://bucket/run"]
    slice_ = sent(dry(bare, "run", "--", *config))[0][3:]
    manifest = jobset.command(config)[3:]
    slurm = [w for w in slurm_words(1)[2:] if w not in HARD] + config
    assert parse([["wamjax.train", *words] for words in (slice_, manifest, slurm)]) == []


@pytest.mark.parametrize("done, status", [(True, None), (False, 75)])
def test_a_training_stopped_by_a_signal_exits_with_the_requested_status(monkeypatch, done, status):
    values = types.SimpleNamespace(
        distributed=False, config=None, workdir="x", stopped_status=75, FLAGS=None
    )
    monkeypatch.setattr(train, "flags", types.SimpleNamespace(FLAGS=values))
    monkeypatch.setattr(train.hardware, "restart_with_huge_pages", lambda: None)
    monkeypatch.setattr(train, "run", lambda *_: done)
    if done:
        return train.main([])
    with pytest.raises(SystemExit) as end:
        train.main([])
    assert end.value.code == status


def test_launchers_leave_process_discovery_to_jax(bare):
    """On TPU VMs and GKE, JAX finds coordinator, process count and process id by itself."""
    for words in (jobset.command(HARD[::2]), sent(dry(bare, "run", *FLAGS))[0]):
        assert not [w for w in words if w.startswith(("--coordinator", "--process"))]
    assert jax.process_count() == 1
