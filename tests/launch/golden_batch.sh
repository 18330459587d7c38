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

# On a node: settings, then what runs there. What the environment or the user's file sets already stays.
on_node() {
    # The ranks of a node share its cores; torchrun would give each a single thread.
    local threads=$(($(nproc) / ranks))
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
    # A node's own address, by Slurm's word: names may not resolve among nodes.
    local address
    address=$(tr ' ' '\n' <<<"$addresses" | sed -n "s/^$SLURMD_NODENAME=//p")
    case $1 in
    test)
        exec "$python" -m plait.launch selftest "$2" --meet "$meet" --ranks "$room" --run "$run"
        ;;
    train)
        # A life of the run ends with its first rank that fails; the job then decides what follows.
        local host=0
        [ "$SLURM_NODEID" != 0 ] || host=1
        exec "$python" -m torch.distributed.run \
            --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts 0 --monitor-interval 1 \
            --rdzv-backend c10d --rdzv-id "$life_id" --rdzv-endpoint "$meet" --rdzv-conf "is_host=$host" \
            --local-addr "$address" -m plait.launch train "$launch/config.yaml"
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

nodelist=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)
addresses=$(scontrol --oneliner show nodes "$SLURM_JOB_NODELIST" | sed -nE 's/^NodeName=(\S+) .*NodeAddr=(\S+) .*/\1=\2/p' | paste -sd' ' -)
# Jobs that share a node meet at ports of their own.
port=$((20000 + SLURM_JOB_ID % 20000))
job=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
ranks=$room nodes=$SLURM_JOB_NUM_NODES life=0
export addresses ranks nodes
say "job $job on $nodelist"

while :; do
    life=$((life + 1))
    life_id=$job-$life
    good=$nodelist
    meet=$(tr ' ' '\n' <<<"$addresses" | sed -n '1s/.*=//p'):$port
    export life_id meet
    reports=$launch/self-test/$life_id
    mkdir -p "$reports"
    # A node that does not end its test is found by what it has not written.
    through srun --ntasks-per-node=1 --time=5 --kill-on-bad-exit=0 \
        "$launch/batch.sh" test "$reports" || say "the self-test did not end well"
    [ -z "$asked" ] || leave 75
    status=0
    found=$(plait judge "$reports" --nodes "$nodelist" --run "$run" --slow 0.75 --names) || status=$?
    echo "$found"
    good=${found##*$'\n'}
    if [ $status != 0 ]; then
        say "nodes failed the self-test; --exclude NODE keeps one out, --exclude-bad-nodes all such"
        exit 1
    fi
    status=0
    start=$(plait job begin "$run" --job "$job" --nodes "$good" --gpus-per-node "$room") || status=$?
    [ $status = 0 ] || leave "$((status == 3 ? 0 : status))"
    read -r nodes ranks chosen <<<"$start"
    meet=$(tr ' ' '\n' <<<"$addresses" | sed -n "s/^${chosen%%,*}=//p"):$port
    export nodes ranks meet
    through srun --nodes="$nodes" --ntasks-per-node=1 --nodelist="$chosen" --kill-on-bad-exit=1 \
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
        plait launch cancel "$run" --pending
        exit "$status"
        ;;
    esac
done
