#!/bin/bash
# A SLURM cluster of GPUs, one process a GPU. From the repository's root, on a disk that all nodes share:
#
#     sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 experiments/launch/slurm.sh --smoke
#     sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 experiments/launch/slurm.sh \
#         rlx train ppo playground/CheetahRun --num-envs 32768 --num-groups 16 --run-dir /shared/runs/cheetah
#
# SLURM tells the processes of each other. Two minutes before the time limit, and when a preemptible partition takes the
# nodes back (its GraceTime must leave a minute), all get SIGTERM: the run saves itself, and the job queues anew, which
# goes on with it. A command that fails ends the job for good.
#SBATCH --job-name=rlx
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --time=12:00:00
#SBATCH --cpus-per-task=8

set -uo pipefail
export PATH="$PWD/.venv/bin:$PATH"
[ $# -gt 0 ] || { echo "what to run: --smoke, or an rlx command" >&2; exit 2; }
if [ "$1" = --smoke ]; then
    set -- python experiments/launch/smoke.py --run-dir "${2:-$PWD/runs}"
fi

case " $* " in
    *" --overwrite "*) echo "--overwrite would begin anew whenever the job is queued again" >&2; exit 2 ;;
esac

# The processes get the signal themselves; this shell must outlive them to read how they ended.
trap : TERM
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@" --distributed &
wait $!
status=$?
while kill -0 $! 2> /dev/null; do wait $!; status=$?; done  # a signal ends `wait` early
wait $!
last=$?
[ "$last" -eq 127 ] || status=$last  # srun's own, where a signal came with its end
if [ "$status" -eq 130 ]; then
    echo "stopped and saved; queued anew"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
