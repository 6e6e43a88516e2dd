#!/usr/bin/env bash
# Trains on a slice of TPU VMs. This one script runs here and, copied there, on every worker.
#
#   bash tpu/launch.sh VERB [SETTINGS] [-- FLAGS OF wamjax.train]
#
#   setup    create the slice if it does not exist, wait for it, copy the code, install
#   run      start the training on all workers and return
#   resume   the same, after recreating the slice if it was deleted or preempted
#   keep     resume whenever needed until the run is done; this machine must stay on
#   tail     follow the log of one worker
#   status   print one word: running, done, saved (by a signal), stopped, failed, none
#   stop     save, stop and wait; the slice stays and is billed
#   delete   delete the slice
#
# Settings, as --name=VALUE or as environment variables WAMJAX_NAME (defaults in brackets):
#
#   name      of the queued resource and the slice       zone      e.g. us-east5-b
#   type      e.g. v6e-16, v5p-64 (cores), v5litepod-16  project   (gcloud's)
#   slices    number of slices in one training (1)       version   runtime version (by type)
#   spot      1: cheaper, may be preempted               reserved  1: use a reservation
#   extras    extras to install (tpu,gcs)                worker    worker to follow (0)
#   poll      seconds between checks (30)                retries   of `keep` after errors (3)
#
# --dry-run prints every command and runs none. TPU7x is available on GKE only: tpu/jobset.py.
# Copies the files that git tracks, with uncommitted changes, but not files that were never added.

set -euo pipefail

STOPPED=75 # exit status of a training that a signal stopped

die() {
  echo "error: $*" >&2
  exit 2
}

# ---- on a worker ----

root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
state=$HOME/wamjax-run # log, pid, status, stopped

# Whether a training runs here; another process may have its number after a restart.
alive() {
  [[ -f $state/pid && ! -f $state/status ]] || return
  local of
  of=$(tr '\0' ' ' 2>/dev/null <"/proc/$(<"$state/pid")/cmdline") && [[ $of == *wamjax.train* ]]
}

worker_setup() { # EXTRAS; the Python of the VM is older than what wamjax needs
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --allow-existing --python 3.12 "$root/.venv"
  python3 -m uv pip install --quiet --python "$python" --editable "${root}[$1]"
}

worker_run() {
  [[ -x $python ]] || die "nothing is installed in $root: setup first"
  if alive; then die "process $(<"$state/pid") trains here: stop it first"; fi
  mkdir -p "$state"
  rm -f "$state/pid" "$state/status" "$state/stopped"
  nohup setsid bash "$0" worker_hold "$@" >>"$state/log" 2>&1 </dev/null &
  until [[ -s $state/pid ]]; do sleep 0.1; done
}

worker_hold() { # the parent of the training, which keeps its exit status
  cd "$root"
  PYTHONUNBUFFERED=1 "$python" -m wamjax.train "$@" &
  echo $! >"$state/pid.new" && mv "$state/pid.new" "$state/pid"
  local status=0
  wait $! || status=$?
  echo "$status" >"$state/status"
}

worker_stop() {
  if ! alive; then
    echo "no training runs here"
    return
  fi
  # A second signal would end it at once, without saving.
  if [[ ! -f $state/stopped ]]; then
    touch "$state/stopped"
    kill -TERM "$(<"$state/pid")"
  fi
  while alive; do sleep 1; done
  worker_status
}

worker_status() {
  if alive; then
    echo running
  elif [[ ! -f $state/status ]]; then
    if [[ -f $state/pid ]]; then echo "failed 137"; else echo none; fi # killed with its parent
  elif [[ $(<"$state/status") == 0 ]]; then
    echo "done"
  elif [[ -f $state/stopped ]]; then
    echo stopped
  elif [[ $(<"$state/status") == "$STOPPED" ]]; then
    echo saved
  else
    echo "failed $(<"$state/status")"
  fi
}

worker_tail() { exec tail -n 50 -F "$state/log"; }

case ${1-} in worker_*)
  "$@"
  exit
  ;;
esac

# ---- on this machine ----

name=${WAMJAX_NAME-} zone=${WAMJAX_ZONE-} type=${WAMJAX_TYPE-} project=${WAMJAX_PROJECT-}
version=${WAMJAX_VERSION-} slices=${WAMJAX_SLICES-1} spot=${WAMJAX_SPOT-}
reserved=${WAMJAX_RESERVED-} extras=${WAMJAX_EXTRAS-tpu,gcs} worker=${WAMJAX_WORKER-0}
poll=${WAMJAX_POLL-30} retries=${WAMJAX_RETRIES-3} dry=

verbs="setup run resume keep tail status stop delete"
verb=${1-}
case $verb in
'' | -h | --help)
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit
  ;;
esac
[[ " $verbs " == *" $verb "* ]] || die "$verb is no verb: one of $verbs"
shift
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
  --dry-run) dry=1 ;;
  --spot) spot=1 ;;
  --reserved) reserved=1 ;;
  --name=* | --zone=* | --type=* | --project=* | --version=* | --slices=* | --spot=* | \
    --reserved=* | --extras=* | --worker=* | --poll=* | --retries=*)
    setting=${1#--}
    printf -v "${setting%%=*}" %s "${setting#*=}"
    ;;
  *) die "$1 is no setting: flags of the training stand behind --" ;;
  esac
  shift
done
[[ ${1-} == -- ]] && shift
train=("$@")

[[ -n $name ]] || die "no name of a slice: --name=NAME or WAMJAX_NAME"
[[ -n $zone ]] || die "no zone: --zone=ZONE or WAMJAX_ZONE, e.g. us-east5-b"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "--name=$name: lower case, digits and -"
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices is no number of slices"
[[ -z $spot || -z $reserved ]] || die "--spot and --reserved exclude one another"

creates() { case $verb in setup | resume | keep) true ;; *) false ;; esac }
starts() { case $verb in run | resume | keep) true ;; *) false ;; esac }

if creates; then
  case $type in
  '') die "no type of a slice: --type=TYPE or WAMJAX_TYPE, e.g. v6e-16" ;;
  tpu7x*) die "--type=$type: TPU7x is to be had by GKE alone, see tpu/jobset.py" ;;
  v6e-*) version=${version:-v2-alpha-tpuv6e} ;;
  v5p-*) version=${version:-v2-alpha-tpuv5} ;;
  v5litepod-*) version=${version:-v2-alpha-tpuv5-lite} ;;
  v[234]-*) version=${version:-tpu-ubuntu2204-base} ;;
  *) [[ -n $version ]] || die "--type=$type: its runtime is not known, give --version too" ;;
  esac
fi

# The value of a flag of the training, '' without it.
value() {
  local word
  for word in ${train[@]+"${train[@]}"}; do
    case $word in "--$1="*) printf %s "${word#*=}" ;; esac
  done
}

if starts; then
  [[ -n $(value config) ]] || die "no --config=FILE behind --"
  case $(value workdir) in
  gs://* | /*) ;; # a path must be of something that all workers mount
  '') die "no --workdir=gs://BUCKET/RUN behind --" ;;
  *) die "--workdir=$(value workdir) would be another folder on every worker: gs://BUCKET/RUN," \
    "or the absolute path of what all of them mount" ;;
  esac
  train+=(--distributed "--stopped_status=$STOPPED")
elif [[ ${#train[@]} -gt 0 ]]; then
  die "$verb takes no flags of the training: ${train[*]}"
fi
[[ -n $dry ]] || command -v gcloud >/dev/null || die "gcloud is not installed, or not on PATH"

nodes=("$name")
if [[ $slices -gt 1 ]]; then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi
where=("--zone=$zone")
if [[ -n $project ]]; then where+=("--project=$project"); fi

say() { if [[ -n $dry ]]; then echo "# $*"; else echo "$*" >&2; fi; }

# Words as a shell reads them; in quotes what needs them.
quote() {
  local word space=
  for word in "$@"; do
    case $word in
    '' | *[!A-Za-z0-9_@%+=:,./-]*)
      printf "%s'%s'" "$space" "$(printf %s "$word" | sed "s/'/'\\\\''/g")"
      ;;
    *) printf '%s%s' "$space" "$word" ;;
    esac
    space=' '
  done
}

call() { # a command, or its print
  if [[ -z $dry ]]; then
    "$@"
  else
    quote "$@"
    echo
  fi
}

tpus() { call gcloud compute tpus "$@" "${where[@]}"; }

on() { # NODE WORKERS COMMAND
  tpus tpu-vm ssh "$1" "--worker=$2" "--command=$3"
}

launcher="bash wamjax/tpu/launch.sh"

# Sets `slice`: the state of the queued resource, NONE, or UNKNOWN when it could not be asked.
look() {
  local asked=(queued-resources describe "$name" '--format=value(state.state)') error
  if slice=$(tpus "${asked[@]}" 2>/dev/null); then return; fi
  if error=$(tpus "${asked[@]}" 2>&1 >/dev/null); then
    slice=UNKNOWN # the next look tells
    return
  fi
  slice=NONE
  if [[ $error != *NOT_FOUND* ]]; then
    say "$error"
    slice=UNKNOWN
  fi
}

create() {
  local kind=() place=("--node-id=$name")
  if [[ -n $spot ]]; then kind=(--spot); fi
  if [[ -n $reserved ]]; then kind=(--reserved); fi
  if [[ $slices -gt 1 ]]; then place=("--node-count=$slices" "--node-prefix=$name"); fi
  tpus queued-resources create "$name" "--accelerator-type=$type" "--runtime-version=$version" \
    "${place[@]}" ${kind[@]+"${kind[@]}"}
}

# Not --async: the name is free again when it returns.
remove() { tpus queued-resources delete "$name" --force --quiet; }

# Makes the slice if it has to; sets `fresh` if it did.
ensure() {
  if [[ -n $dry ]]; then
    say "every $poll s, until it is ACTIVE:"
    tpus queued-resources describe "$name" '--format=value(state.state)'
    say "where it was pre-empted (SUSPENDED), or FAILED:"
    remove
    say "where there is none, and after that:"
    create
    fresh=1
    return
  fi
  while :; do
    look
    case $slice in
    ACTIVE) return ;;
    NONE)
      say "no slice of this name: creating it"
      create
      fresh=1
      ;;
    SUSPENDING | SUSPENDED | FAILED)
      say "the slice is $slice (pre-empted, or it could not be had): creating it anew"
      remove
      create
      fresh=1
      ;;
    UNKNOWN) [[ $verb == keep ]] || die "the state of $name could not be asked, see above" ;;
    *) say "the slice is $slice" ;; # WAITING_FOR_RESOURCES, PROVISIONING, ...
    esac
    sleep "$poll"
  done
}

# Also where `set -e` is off, as behind `if`, nothing goes on after a failure.
install() {
  local archive=/tmp/$name-wamjax.tar.gz tree='' node
  # A commit of the working tree as it is, that no branch comes to know of.
  if [[ -z $dry ]]; then tree=$(git -C "$root" stash create); fi
  call git -C "$root" archive --format=tar.gz "--output=$archive" "${tree:-HEAD}" || return
  for node in "${nodes[@]}"; do
    on "$node" 0 true || return # brings the key there; all workers at once would each try
    tpus tpu-vm scp "$archive" "$node:wamjax.tar.gz" --worker=all || return
    on "$node" all "mkdir -p wamjax && tar -xzf wamjax.tar.gz -C wamjax && $launcher worker_setup $(
      quote "$extras"
    )" || return
  done
}

start() {
  local node
  for node in "${nodes[@]}"; do
    on "$node" all "$launcher worker_run $(quote "${train[@]}")" || return
  done
}

# One word; `bare` is a worker without the code.
training() {
  on "${nodes[0]}" 0 \
    "if [ -f wamjax/tpu/launch.sh ]; then $launcher worker_status; else echo bare; fi"
}

resume() {
  fresh=
  ensure
  if [[ -n $fresh ]]; then
    say "on a new slice:"
    install
    say "then:"
  fi
  start
}

keep() {
  local failures=0 word
  if [[ -n $dry ]]; then
    resume
    say "every $poll s; from the top where it saved, failed, or the slice is gone:"
    training
    return
  fi
  fresh=
  while :; do
    ensure
    if [[ -n $fresh ]]; then
      failures=0
      word=bare
    else
      word=$(training | tail -n 1) || word=unreachable
    fi
    case $word in
    running | unreachable) ;;
    bare)
      say "installing"
      if install; then
        fresh=
        continue
      fi
      say "not all workers could install it"
      ;;
    none | saved)
      say "starting it"
      start || say "not all workers could start it"
      ;;
    "done")
      say "done: $(value workdir)"
      return
      ;;
    stopped)
      say "stopped by hand: resume goes on from there"
      return
      ;;
    "failed 2") die "the training was asked for what cannot be: see tail" ;;
    *)
      # One that lost another worker ends with an error as well, and goes on from a checkpoint.
      failures=$((failures + 1))
      [[ $failures -le $retries ]] || die "the training failed $failures times ($word): see tail"
      say "the training ended ($word): starting it again, $failures of $retries"
      start || say "not all workers could start it"
      ;;
    esac
    sleep "$poll"
  done
}

case $verb in
setup)
  fresh=
  ensure
  install
  ;;
run) start ;;
resume) resume ;;
keep) keep ;;
tail) on "${nodes[0]}" "$worker" "$launcher worker_tail" ;;
status) training ;;
stop) for node in "${nodes[@]}"; do on "$node" all "$launcher worker_stop"; done ;;
delete) remove ;;
esac
