# Steps that all run, each within a time, and a table of how they went. Sourced after common.sh.
# Everything they print also goes to $OUT/gpu-check.log; $OUT is a folder that the sourcing script has made.
#
#   step NAME SECONDS COMMAND...   runs a program or a function of the sourcing script, unless $ELASTIKV_STEPS names
#                                  other steps only
#   finish                         prints the table, writes it to $OUT, exits 1 if any step failed
# shellcheck shell=bash

BUDGET="${ELASTIKV_BUDGET:-540}" # seconds for all of them
RESULTS=()
FAILED=0
: >"$OUT/gpu-check.log"

remaining() { echo $((BUDGET - SECONDS)); }
record() { RESULTS+=("$(printf '%-14s %-8s %5s s  %s' "$1" "$2" "$3" "${4:-}")"); }

step() {
    local name="$1" limit="$2" started="$SECONDS" status=0 left
    shift 2
    [[ " ${ELASTIKV_STEPS:-$name} " == *" $name "* ]] || return 0
    left="$(remaining)"
    if [ "$left" -lt 5 ]; then
        record "$name" FAIL 0 "no time left of $BUDGET s"
        FAILED=1
        return
    fi
    [ "$limit" -le "$left" ] || limit="$left"
    say "$name (at most $limit s)"
    run_limited "$limit" "$@" 2>&1 | tee -a "$OUT/gpu-check.log"
    status="${PIPESTATUS[0]}"
    case "$status" in
        0) record "$name" ok $((SECONDS - started)) ;;
        124) record "$name" FAIL $((SECONDS - started)) "ran past $limit s" ;;
        *) record "$name" FAIL $((SECONDS - started)) "exit $status" ;;
    esac
    [ "$status" -eq 0 ] || FAILED=1
}


# timeout(1) takes programs only; a function gets a shell of its own, in a process group that is ended as a whole.
run_limited() {
    local limit="$1" child watcher status=0
    shift
    set -m
    ( set +m; "$@" ) &
    child=$!
    ( sleep "$limit"; kill -TERM -- "-$child"; sleep 5; kill -KILL -- "-$child" ) >/dev/null 2>&1 &
    watcher=$!
    wait "$child" || status=$?
    if kill -0 "$watcher" 2>/dev/null; then
        kill -- "-$watcher" 2>/dev/null
    fi
    set +m
    [ "$status" -ne 143 ] && [ "$status" -ne 137 ] || status=124
    return "$status"
}

finish() {
    {
        printf '\n%-14s %-8s %7s\n' step result time
        printf '%s\n' "${RESULTS[@]}"
        printf 'total %s s\n' "$SECONDS"
    } | tee "$OUT/summary.txt"
    cat "$OUT/summary.txt" >>"$OUT/gpu-check.log"
    exit "$FAILED"
}
