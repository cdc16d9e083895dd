#!/usr/bin/env bash
# Train @{name} on a TPU slice @{accelerator_type}: @{shape}, @{chips} chips, @{hosts} host(s) of @{chips_per_host}. Printed by
#
#   python -m jaxllm.tools.launch --config=@{config} --for=tpuvm
#
# Run from the root of the repository, on a machine that stays (in tmux, or on a small VM):
#
#   bash this_file.sh
#
# The Cloud TPU API is no longer developed, and has no TPU7x: see --for=gke.
#
# It asks for the slice through a queued resource, copies this directory to every host, trains, and
# does so again when the slice is taken away, until the run has finished. All that must outlive a
# slice is in the bucket of the workdir.
set -euo pipefail

NAME=@{name}
ZONE=@{zone}  # One that has this kind of TPU and your quota.
WORKDIR=@{workdir}
ARGUMENTS=(
  @{arguments}
)

tpu() { gcloud compute tpus "$@@" --zone="$ZONE" --quiet; }
on_all_hosts() { tpu tpu-vm ssh "$NAME" --worker=all --command="$1"; }
state() { tpu queued-resources describe "$NAME" --format='value(state.state)' 2>/dev/null || true; }
finished() { gcloud storage ls "$WORKDIR/summary.json" >/dev/null 2>&1; }
give_back() { tpu queued-resources delete "$NAME" --force || true; }
trap give_back EXIT

failures=0
until finished; do
  if [ -z "$(state)" ]; then
    tpu queued-resources create "$NAME" --node-id="$NAME" \
      --accelerator-type=@{accelerator_type} --runtime-version=@{runtime} @{spot}
  fi
  until [ "$(state)" = ACTIVE ]; do
    case "$(state)" in FAILED|SUSPENDED) break ;; esac
    sleep 30
  done

  log=$(mktemp)
  if tpu tpu-vm scp --recurse --worker=all . "$NAME:jaxllm"; then
    # The Python of the image may be too old, so uv brings one of its own. The last line tells what
    # happened: 0 finished, 75 saved because the hosts are taken away, 2 refused, 1 failed.
    on_all_hosts "
      set -e
      curl -LsSf https://astral.sh/uv/install.sh | sh
      cd ~/jaxllm
      ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/venv
      ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python '.[tpu,gcs]'
      code=0
      ~/venv/bin/python -m jaxllm.train $(printf '%q ' "${ARGUMENTS[@@]}") || code=\$?
      echo \"jaxllm.train ended with code \$code\"
    " 2>&1 | tee "$log" || true
  fi
  if grep -q 'jaxllm.train ended with code 2' "$log"; then
    echo 'The run was refused, and would be again; see above.' >&2
    exit 2
  fi
  if grep -q 'jaxllm.train ended with code 1' "$log" && [ $((failures += 1)) -ge 5 ]; then
    echo 'The run has failed five times; see above.' >&2
    exit 1
  fi
  # A slice that was taken away stays in the list until it is deleted.
  if [ "$(state)" != ACTIVE ]; then give_back; fi
  sleep 10
done
echo "finished: $WORKDIR"
