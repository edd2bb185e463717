#!/bin/bash
# A TPU pod slice on Google Cloud, one process a host. On a machine with gcloud, from the repository's root:
#
#     export TPU=my-pod ZONE=us-central2-b
#     experiments/launch/tpu_pod.sh create v5litepod-16 --spot     # or without --spot
#     experiments/launch/tpu_pod.sh install                        # the last commit, on every host
#     experiments/launch/tpu_pod.sh smoke gs://BUCKET/runs
#     experiments/launch/tpu_pod.sh run rlx train ppo brax/ant --num-envs 8192 --num-groups 16 --run-dir gs://BUCKET/runs/ant
#     experiments/launch/tpu_pod.sh stop                           # SIGTERM: the run saves itself; `run` goes on
#     experiments/launch/tpu_pod.sh delete
#
# The hosts find each other by the pod's own metadata. Spot machines are taken back with SIGTERM and half a minute: the
# run saves itself if an epoch and a save fit in that, and else loses what was learned since its last checkpoint.
# `delete`, `create`, `install`, `run` with the same command goes on. `VERSION` is the TPU's software.
set -euo pipefail
: "${TPU:?the name of the pod}" "${ZONE:?its zone}"
VERSION=${VERSION:-v2-alpha-tpuv5-lite}

on_every_host() { gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"; }

command=${1:?create, install, smoke, run, stop or delete}
shift
case $command in
    create)
        type=${1:?the accelerator type, as v5litepod-16}
        shift
        gcloud compute tpus tpu-vm create "$TPU" --zone "$ZONE" --accelerator-type "$type" --version "$VERSION" "$@"
        ;;
    install)
        git archive --format tar.gz --output /tmp/rlx.tar.gz HEAD
        gcloud compute tpus tpu-vm scp /tmp/rlx.tar.gz "$TPU:" --zone "$ZONE" --worker=all
        # uv, since the TPU's images may come with an older Python than 3.11.
        on_every_host "mkdir -p rlx && tar xzf rlx.tar.gz -C rlx && cd rlx && python3 -m pip install --quiet --user uv \
            && python3 -m uv venv --quiet --python 3.11 .venv \
            && python3 -m uv pip install --quiet --python .venv -c constraints.txt -e '.[tpu,gcs]' && .venv/bin/rlx doctor"
        ;;
    smoke)
        on_every_host "cd rlx && .venv/bin/python experiments/launch/smoke.py --run-dir ${1:?gs://BUCKET/PATH}"
        ;;
    run)
        # In the background of each host, so that a lost connection does not end it; the first one's log is shown.
        on_every_host "cd rlx && export PATH=\$PWD/.venv/bin:\$PATH \
            && { nohup $(printf '%q ' "$@") --distributed > run.log 2>&1 < /dev/null & }"
        gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=0 --command "tail -n +1 -f rlx/run.log"
        ;;
    stop)
        gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=0 --command "pkill -TERM -f -- --distributed"
        ;;
    delete)
        gcloud compute tpus tpu-vm delete "$TPU" --zone "$ZONE"
        ;;
    *)
        echo "create, install, smoke, run, stop or delete, not $command" >&2
        exit 2
        ;;
esac
