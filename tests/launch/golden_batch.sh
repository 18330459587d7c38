#!/usr/bin/env bash
# /data/runs/base, written by `plait launch slurm`.
# Slurm runs it as the job, without an argument; the job runs it on each of its nodes, with `test` or `train`.
#
#SBATCH --job-name=base
#SBATCH --nodes=1-2
#SBATCH --partition=gpu
#SBATCH --time=1-00:00:00
#SBATCH --gpus-per-node=2
#SBATCH --exclusive
#SBATCH --output=/data/runs/base/logs/slurm-%j.log
#SBATCH --open-mode=append
# The shell of this script, not its steps, hears in time that the end is near, and has the run saved.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
set -euo pipefail

run=/data/runs/base
python=/opt/plait/bin/python
launch=$run/launch
# Ranks that a node has room for.
room=2

plait() { "$python" -m plait.launch "$@"; }
say() { echo "plait: $(date +%FT%T) $*"; }

# Where the nodes are, by Slurm's word: their names may not resolve among them. The job tells its nodes.
: "${job_nodelist:=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)}"
: "${job_addresses:=$(scontrol --oneliner show nodes "$SLURM_JOB_NODELIST" | sed -nE 's/^NodeName=(\S+) .*NodeAddr=(\S+) .*/\1=\2/p' | paste -sd' ' -)}"
address_of() { tr ' ' '\n' <<<"$job_addresses" | sed -n "s/^$1=//p"; }
# Jobs that share a node meet at ports of their own.
port=$((20000 + SLURM_JOB_ID % 20000))
: "${job_meet:=$(address_of "${job_nodelist%%,*}"):$port}"
: "${job_ranks:=$room}"

# On a node: settings, then what runs there. What the environment or the user's file sets already stays.
on_node() {
    # The ranks of a node share its cores; torchrun would give each a single thread.
    local threads=$(($(nproc) / job_ranks))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
    # What rank 0 prints is in the log at once.
    export PYTHONUNBUFFERED=1
    # NCCL says what went wrong, not only that a collective did not return.
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    # Sequences and experts differ in length from step to step; segments that grow do not fragment.
    export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
    # How long torchrun, sent SIGTERM, lets its ranks finish a step and save.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
    # Of a node's networks, the one between ranks; without this NCCL and gloo may take the slow one.
    export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-ib0}"
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-ib0}"
    case $1 in
    test)
        [ "$SLURM_NODEID" != 0 ] || echo "$job_nodelist" >"$2/nodes"
        exec "$python" -m plait.launch selftest "$2" --meet "$job_meet" --ranks "$room" --run "$run"
        ;;
    train)
        # A life of the run ends with its first rank that fails; the job then decides what follows.
        local host=0
        [ "$SLURM_NODEID" != 0 ] || host=1
        exec "$python" -m torch.distributed.run \
            --nnodes "$job_nodes" --nproc-per-node "$job_ranks" --max-restarts 0 --monitor-interval 1 \
            --rdzv-backend c10d --rdzv-id "$job_life" --rdzv-endpoint "$job_meet" --rdzv-conf "is_host=$host" \
            --local-addr "$(address_of "$SLURMD_NODENAME")" -m plait.launch train "$launch/config.yaml"
        ;;
    esac
}

if [ $# -gt 0 ]; then
    on_node "$@"
fi

# Asked to stop: the file is what ranks see after their step, and a signal to a step would end torchrun instead.
asked=""
ask() {
    asked=$1
    say "SIG$1: the run is to stop, with a checkpoint"
    echo "Slurm job $SLURM_JOB_ID: SIG$1" >"$run/stop"
}
trap 'ask USR1' USR1
trap 'ask TERM' TERM

# Run a command to its end, whatever signals come meanwhile.
through() {
    "$@" &
    local pid=$! status=0
    wait "$pid" || status=$?
    while kill -0 "$pid" 2>/dev/null; do
        status=0
        wait "$pid" || status=$?
    done
    return "$status"
}

# Slurm's own requeueing follows a SIGTERM; after SIGUSR1 it is this script that asks for it.
leave() {
    if [ "$asked" = USR1 ]; then
        say "back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    exit "$1"
}

job=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
life=0
export job_nodelist job_addresses
say "job $job on $job_nodelist"

while :; do
    life=$((life + 1))
    job_life=$job-$life
    good=$job_nodelist
    export job_life
    reports=$launch/self-test/$job_life
    mkdir -p "$reports"
    # A node that does not end its test is found by what it has not written.
    unset job_meet job_ranks
    through srun --ntasks-per-node=1 --time=5 --kill-on-bad-exit=0 \
        "$launch/batch.sh" test "$reports" || say "the self-test did not end well"
    [ -z "$asked" ] || leave 75
    status=0
    found=$(plait judge "$reports" --nodes "$job_nodelist" --run "$run" --slow 0.75 --names) || status=$?
    echo "$found"
    good=${found##*$'\n'}
    if [ $status != 0 ]; then
        say "nodes failed the self-test; --exclude NODE keeps one out, --exclude-bad-nodes all such"
        exit 1
    fi
    status=0
    start=$(plait job begin "$run" --job "$job" --nodes "$good" --gpus-per-node "$room") || status=$?
    [ $status = 0 ] || leave "$((status == 3 ? 0 : status))"
    read -r job_nodes job_ranks chosen <<<"$start"
    job_meet=$(address_of "${chosen%%,*}"):$port
    export job_nodes job_ranks job_meet
    through srun --nodes="$job_nodes" --ntasks-per-node=1 --nodelist="$chosen" --kill-on-bad-exit=1 \
        "$launch/batch.sh" train || true
    status=0
    plait job end "$run" --job "$job" || status=$?
    if [ $status = 0 ] || [ -n "$asked" ]; then
        leave "$status"
    fi
    case $status in
    100) say "the run is started again" ;;
    75) exit 0 ;;
    *)
        # Jobs that wait for this one would meet the same.
        plait launch cancel "$run" --pending || say "they are still in the queue"
        exit "$status"
        ;;
    esac
done
