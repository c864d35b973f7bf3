# The measurements of bench/gpu, which sources this file. Results: one folder below $logs/bench for each name, with what `varve bench`
# wrote there and the twin's JSON lines; bench/gpu_table.py makes the table of them.

bench_names=(large large50 standard every-step stall restore monitor monitor-every-step monitor-restart twin pairs-standard pairs-large50 pairs-every-step pairs-monitor scenarios 5gb)
repeats=${REPEATS:-3}
device=${DEVICE:-cuda}
tiny=${TINY:-0}
staging=pinned
[[ $device == cpu ]] && staging=host

# The sizes: of varve bench and of the twin, whose options have the same names.
standard=(--d-model 512 --num-layers 6 --batch-size 16)
large=(--d-model 1024 --num-layers 12 --batch-size 8)
huge=(--d-model 1536 --num-layers 18 --dim-feedforward 3072 --batch-size 4)
pairs=${PAIRS:-30}
steps=100 stall_steps=${STALL_STEPS:-1500} every_step=300 warmup=10 monitor_steps=60 monitor_repeats=${MONITOR_REPEATS:-7}
if [[ $tiny == 1 ]]; then
    small=(--d-model 32 --nhead 2 --vocab-size 200 --dim-feedforward 64 --seq-len 8 --batch-size 2 --num-samples 40)
    standard=("${small[@]}" --num-layers 1)
    large=("${small[@]}" --num-layers 2)
    huge=("${small[@]}" --num-layers 3)
    steps=50 stall_steps=100 every_step=20 warmup=2 monitor_steps=30 monitor_repeats=1
fi

measured=()  # folders that this call added to

# varve bench into the folder of $1, for at most $2 seconds.
varve_bench() {
    local name=$1 most=$2 folder=$logs/bench/$1
    shift 2
    mkdir -p "$folder"
    measured+=("$name")
    limited "$most" "$folder/varve.log" "$build/tools/varve" bench --output-dir "$folder" --checkpoint-dir "$work/checkpoints/$name" --device "$device" \
        --warmup "$warmup" "$@"
    local status=$?
    [[ $status == 0 ]] || { say "  varve bench ($name) ended with $status$([[ $status == 124 ]] && echo ', out of time')"; tail -5 "$folder/varve.log"; }
    rm -rf "$work/checkpoints/$name"
    return "$status"
}

# Pairs of stretches with and without saves into the folder of $1, for at most $2 seconds.
loop_pairs() {
    local name=$1 most=$2 folder=$logs/bench/$1
    shift 2
    mkdir -p "$folder"
    measured+=("$name")
    limited "$most" "$folder/pairs.log" "$build/bench/bench_loop_pairs" --output-dir "$folder" --checkpoint-dir "$work/checkpoints/$name" \
        --device "$device" --warmup "$warmup" --repeat "$pairs" "$@"
    local status=$?
    [[ $status == 0 ]] || { say "  bench_loop_pairs ($name) ended with $status$([[ $status == 124 ]] && echo ', out of time')"; tail -5 "$folder/pairs.log"; }
    rm -rf "$work/checkpoints/$name"
    return "$status"
}

# The Python twin into the folder of $1, for at most $2 seconds.
twin() {
    local name=$1 most=$2 folder=$logs/bench/$1
    shift 2
    mkdir -p "$folder" "$work/checkpoints"
    measured+=("$name")
    limited "$most" "$folder/twin.log" "$python" -W ignore "$here/twin.py" --folder "$work/checkpoints" --output "$folder/twin.jsonl" --label "$name" \
        --device "$device" --warmup "$warmup" "$@"
    local status=$?
    [[ $status == 0 ]] || { say "  the twin ($name) ended with $status$([[ $status == 124 ]] && echo ', out of time')"; tail -5 "$folder/twin.log"; }
    return "$status"
}

# Kills a trainer once step 20 is crash-safe and lets another go on: its word of the restore goes to restart.log.
restart_from_monitor() {
    local store=$work/checkpoints/restart folder=$logs/bench/monitor-restart waited
    rm -rf "$store"
    mkdir -p "$work/checkpoints"
    local -a run=("$build/tools/varve" train --method layerwise --dir "$store" --use-monitor --device "$device" "${large[@]}" --checkpoint-freq 20)
    "${run[@]}" --num-steps 100000 --events "$folder/events.jsonl" >>"$folder/train.log" 2>&1 &
    for ((waited = 0; waited < 600; ++waited)); do
        grep -qs '"crash_safe".*"step": *20[,}]' "$folder/events.jsonl" && break
        sleep 0.1
    done
    kill -9 $! && wait $! 2>/dev/null
    rm -f "$folder/events.jsonl"
    # The monitor copies what lingers out of the trainer's pool first.
    sleep 3
    limited 60 "$folder/again.log" "${run[@]}" --num-steps 21
    local status=$?
    grep 'goes on from' "$folder/again.log" >>"$folder/restart.log" || { say "  no restart from the monitor"; tail -3 "$folder/train.log" "$folder/again.log"; status=1; }
    rm -rf "$store"
    return "$status"
}

# A combination only where this build and machine have it.
runnable() {
    local name
    for name in "$@"; do "$build/tools/varve" bench --list | awk -v name="$name" '$1 == name && !/cannot run here/ { print name }'; done
}

run_bench() {
    local name=$1 status=0 i size
    local -a more
    case $name in
    large)
        mapfile -t more < <(runnable "$staging+async+io_uring" ${EXTRA_METHODS:-})
        varve_bench large 500 "${large[@]}" --num-steps "$steps" --checkpoint-freq 10 --repeat "$repeats" \
            --methods ${METHODS:-traditional traditional-durable original layerwise} "${more[@]}" || status=1
        ;;
    large50)
        varve_bench large50 400 "${large[@]}" --num-steps "$steps" --checkpoint-freq 50 --repeat "$repeats" --methods traditional layerwise || status=1
        ;;
    standard)
        mapfile -t more < <(runnable "$staging+async+io_uring" ${EXTRA_METHODS:-})
        varve_bench standard 400 "${standard[@]}" --num-steps "$steps" --checkpoint-freq 10 --repeat "$repeats" \
            --methods ${METHODS:-traditional traditional-durable original layerwise} "${more[@]}" || status=1
        ;;
    every-step)
        mapfile -t more < <(runnable ${EXTRA_METHODS:-})
        varve_bench every-step-standard 250 "${standard[@]}" --num-steps "$((every_step * 2))" --checkpoint-freq 1 --when-busy replace \
            --repeat "$repeats" --methods "$staging+async+io_uring" layerwise "${more[@]}" || status=1
        varve_bench every-step-large 300 "${large[@]}" --num-steps "$every_step" --checkpoint-freq 1 --when-busy replace \
            --repeat "$repeats" --methods "$staging+async+io_uring" layerwise "${more[@]}" || status=1
        ;;
    stall) # percentiles of at least 300 saves that nothing holds up
        varve_bench stall 300 "${large[@]}" --num-steps "$stall_steps" --checkpoint-freq 5 --methods "$staging+async+null" "$staging+layerwise+null" || status=1
        ;;
    stall-disk) # the same to the disk, as often as it takes them
        varve_bench stall-disk 500 "${large[@]}" --num-steps "$((stall_steps * 5))" --checkpoint-freq 25 --methods layerwise || status=1
        ;;
    restore)
        varve_bench restore 250 "${large[@]}" --num-steps 10 --checkpoint-freq 10 --repeat "$repeats" --methods layerwise || status=1
        twin restore 200 "${large[@]}" --load --repeat "$repeats" || status=1
        ;;
    monitor)
        varve_bench monitor 400 "${large[@]}" --num-steps "$monitor_steps" --checkpoint-freq 10 --repeat "$monitor_repeats" --scenario monitor || status=1
        ;;
    monitor-every-step) # each is crash-safe, the disk gets what it can take
        varve_bench monitor-every-step 200 "${standard[@]}" --num-steps "$every_step" --checkpoint-freq 1 --when-busy replace \
            --repeat "$repeats" --methods layerwise layerwise-monitor || status=1
        ;;
    monitor-restart) # a trainer that was killed goes on from the monitor's memory
        mkdir -p "$logs/bench/monitor-restart"
        measured+=(monitor-restart)
        for ((i = 0; i < repeats; ++i)); do restart_from_monitor || status=1; done
        ;;
    twin)
        for ((i = 0; i < repeats; ++i)); do
            for size in standard large; do
                local -n options=$size
                varve_bench "twin-$size" 60 "${options[@]}" --num-steps "$steps" --methods none || status=1
                twin "twin-$size" 90 "${options[@]}" --num-steps "$steps" --methods none --deterministic || status=1
                twin "twin-$size" 90 "${options[@]}" --num-steps "$steps" --methods none || status=1
                twin "twin-$size" 90 "${options[@]}" --num-steps "$steps" --methods none --lazy-loss || status=1
            done
        done
        ;;
    pairs-standard) # half of the steps are behind a save: its writes end within the stretch
        loop_pairs pairs-standard 250 "${standard[@]}" --num-steps 50 --checkpoint-freq 10 --methods layerwise "$staging+async+io_uring" || status=1
        ;;
    pairs-large50)
        loop_pairs pairs-large50 500 "${large[@]}" --num-steps 100 --checkpoint-freq 50 --methods layerwise "$staging+async+io_uring" || status=1
        ;;
    pairs-every-step | pairs-monitor)
        more=(--checkpoint-freq 1 --when-busy replace --methods "$staging+async+io_uring" layerwise)
        if [[ $name == pairs-monitor ]]; then # each is crash-safe: the disk gets one a second, or what it can take; and what the disk alone costs
            [[ -n $(runnable layerwise-monitor) ]] || { say "  no monitor in this build"; return 1; }
            [[ $device == cpu || -z $(runnable gds+async+cufile) ]] || more=("${more[@]::5}" gds+async+cufile gds+layerwise+cufile)
            loop_pairs pairs-monitor-interval 400 "${standard[@]}" --use-monitor --durable-interval 1 --num-steps 80 "${more[@]}" || status=1
            loop_pairs pairs-monitor 120 "${standard[@]}" --use-monitor --num-steps 10 "${more[@]}" || status=1
            loop_pairs pairs-disk 90 "${standard[@]}" --num-steps 10 "${more[@]::4}" --methods disk || status=1
        else
            loop_pairs pairs-every-step-standard 250 "${standard[@]}" --num-steps 10 "${more[@]}" || status=1
            loop_pairs pairs-every-step-large 250 "${large[@]}" --num-steps 20 "${more[@]}" || status=1
        fi
        ;;
    scenarios)
        more=()
        [[ $tiny == 1 ]] && more=("${standard[@]}" --num-steps "$steps")
        varve_bench scenarios 530 --scenario all "${more[@]}" || status=1
        ;;
    5gb)
        varve_bench 5gb 530 "${huge[@]}" --num-steps "$steps" --checkpoint-freq 30 --max-async 2 --repeat "$repeats" \
            --methods traditional traditional-durable layerwise || status=1
        ;;
    *)
        say "unknown bench '$name'; there are ${bench_names[*]} stall-disk"
        return 1
        ;;
    esac
    return "$status"
}

peers() {
    local size status=0
    for size in ${PEERS:-large10 standard10 large50}; do
        local -n options=${size%[0-9][0-9]}
        twin "peers-${size%[0-9][0-9]}-${size: -2}" 500 "${options[@]}" --num-steps "$steps" --checkpoint-freq "${size: -2}" --repeat "$repeats" \
            --methods ${PEER_METHODS:-none torch.save torch.save-durable safetensors dcp-async} || status=1
    done
    return "$status"
}

# What this call measured, and every target that there are figures for; all tables go to figures.txt.
table() {
    [[ ${#measured[@]} == 0 ]] && return
    "$python" "$here/gpu_table.py" "$logs/bench" >"$logs/figures.txt" && cp "$logs/figures.txt" "$results/figures.txt"
    "$python" "$here/gpu_table.py" "$logs/bench" "${measured[@]}"
}
