#!/bin/bash
# Runs resnet-jax on all hosts of a Cloud TPU slice, from its creation to its deletion.
# launch.py fills in the words between @ signs. Exits with the status of the run, or with
# 130 when interrupted.
set -u
name=@NAME@
where=(@WHERE@)
connection=(@CONNECTION@) # of ssh and scp
restarts=@RESTARTS@
poll=@POLL_SECONDS@
scratch=$(mktemp -d)
exists= # whether there may be a slice to delete
child=

say() { echo "$name: $*" >&2; }
die() { say "error: $*"; exit 1; }
# Bash runs a trap only between commands, but at once while it waits.
run() { "$@" & child=$!; wait "$child"; }
queued() { gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
on_hosts() {
  run gcloud compute tpus tpu-vm ssh "$name" --worker=all "${where[@]}" \
    ${connection[@]+"${connection[@]}"} --quiet --command="$1"
}

# ACTIVE, SUSPENDED, FAILED, ...; ABSENT if there is no queued resource.
state() {
  local found look
  for look in 1 2 3; do
    [ "$look" = 1 ] || sleep "$poll"
    found=$(queued describe '--format=value(state.state)' 2> "$scratch/error") &&
      { echo "$found"; return; }
    grep -q NOT_FOUND "$scratch/error" && { echo ABSENT; return; }
  done
  die "gcloud does not report the state of the slice: $(tr '\n' ' ' < "$scratch/error")"
}

delete() {
  exists=
  queued delete --force --quiet ||
    die "the slice could not be deleted and may cost money: see gcloud compute tpus" \
      "queued-resources list ${where[*]}"
}

# Requests the slice and waits for it. Fails if it was preempted meanwhile.
acquire() {
  local before=
  found=$(state) || exit 1
  [ "$found" = ABSENT ] || exists=1
  case $found in
    SUSPENDING | SUSPENDED | FAILED) delete; now=ABSENT ;;
    *) now=$found ;;
  esac
  if [ "$now" = ABSENT ]; then
    exists=1 # A request that failed half-way may leave something.
    queued create --node-id="$name" @REQUEST@ --quiet || die "the request was refused"
  fi
  while now=$(state) || exit 1; [ "$now" != ACTIVE ]; do
    case $now in
      FAILED) die "the request failed; see: gcloud compute tpus queued-resources" \
        "describe $name ${where[*]}" ;;
      SUSPENDING | SUSPENDED | DELETING | ABSENT) return 1 ;;
    esac
    [ "$now" = "$before" ] || say "$now"
    before=$now
    run sleep "$poll"
  done
}

# Whether the slice is gone. A preemption may show only after a minute.
lost() {
  local look
  for look in $(seq 0 @LOOKS@); do
    [ "$look" = 0 ] || run sleep "$poll"
    now=$(state) || exit 1
    [ "$now" = ACTIVE ] || return 0
  done
  return 1
}

# The scripts that run on the hosts.
alive='kill -0 "$(cat run.pid)" 2>/dev/null'
stop='cd resnet_jax; kill -TERM "$(cat run.pid)"; while '$alive'; do sleep 1; done'
# Hosts may still run a command whose peers are gone. The images have Python 3.10, which
# is too old: uv installs a newer one.
install='set -e; mkdir -p resnet_jax; cd resnet_jax
if [ -s run.pid ] && kill -TERM "$(cat run.pid)" 2>/dev/null; then
  while '$alive'; do sleep 1; done
fi
tar -xzf ../resnet_jax.tar.gz
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -e ".[tpu,gcs]"'
# The run does not depend on the connection: a dropped one costs only the view of the log.
start='cd resnet_jax; rm -f run.pid exit_code
nohup sh -c '\''"$@" & echo "$!" > run.pid; wait "$!"; echo "$?" > exit_code'\'' sh \
  '@PROGRAM@' > run.log 2>&1 < /dev/null &'
follow='cd resnet_jax; until [ -s run.pid ]; do sleep 1; done
tail -n +1 -f --pid="$(cat run.pid)" run.log
until [ -s exit_code ]; do sleep 1; done; exit "$(cat exit_code)"'

attempt() {
  if ! { [ "$found" = ACTIVE ] && on_hosts "cd resnet_jax && $alive"; }; then
    run gcloud compute tpus tpu-vm scp "$scratch/resnet_jax.tar.gz" \
      "$name:resnet_jax.tar.gz" \
      --worker=all "${where[@]}" ${connection[@]+"${connection[@]}"} --quiet &&
      on_hosts "$install" && on_hosts "$start" || return
  fi
  local code _
  for _ in 1 2 3 4 5 6 7 8 9 10; do
    on_hosts "$follow"
    code=$?
    # 255: ssh lost the connection.
    [ "$code" = 255 ] && [ "$(state)" = ACTIVE ] || return "$code"
  done
  return "$code"
}

interrupted() {
  trap '' INT TERM
  say "interrupted: the run saves a checkpoint"
  [ -z "$child" ] || kill "$child" 2> "$scratch/error"
  [ "$(state)" != ACTIVE ] || on_hosts "$stop"
  exit 130
}
trap interrupted INT TERM
trap 'rm -rf "$scratch"; [ -z "$exists" ] || [ -n "@KEEP@" ] || delete' EXIT

[ -z "$(git -C @REPOSITORY@ status --porcelain)" ] ||
  say "warning: the hosts get the last commit, without later changes"
git -C @REPOSITORY@ archive --format=tar.gz --output="$scratch/resnet_jax.tar.gz" HEAD ||
  exit 1
for count in $(seq 0 "$restarts"); do
  [ "$count" = 0 ] || say "preempted; restart $count of $restarts"
  acquire || continue
  attempt
  code=$?
  if [ "$code" = 0 ]; then
    # SIGTERM makes a run save and exit 0: only the result says that it is done.
    result=@RESULT@
    { [ -z "$result" ] || gcloud storage ls "$result"; } && exit 0
  else
    lost || exit "$code"
  fi
done
die "preempted, and --restarts $restarts allows no further attempt; the same command" \
  "continues from the last checkpoint"
