#!/usr/bin/env bash
# Run fedsam on this machine as it is deployed: a SuperLink and a SuperNode per key, with TLS and
# node authentication, on loopback only. Everything that it starts ends with it.
#
#   local.sh KEYS WORK [RUN-CONFIG]
#
# KEYS: a folder that keys.sh made. WORK: a new folder for logs and results.
# RUN-CONFIG: keys that differ, as for `flwr run --run-config`, for example 'rounds=10 rho=0.7'.
# Environment: LIMIT, the seconds that the run may take (300).
set -euo pipefail

die() {
    echo "local.sh: $1" >&2
    exit "${2:-1}"
}

[ $# -eq 2 ] || [ $# -eq 3 ] || die "usage: local.sh KEYS WORK [RUN-CONFIG]" 2
[ -f "$1/superlink.pem" ] && [ -f "$1/partitions" ] || die "KEYS $1: not a folder of keys.sh with keys of SuperNodes" 2
[ ! -e "$2" ] || die "WORK $2: exists already; name a new folder" 2
limit=${LIMIT:-300}
[[ $limit =~ ^[1-9][0-9]*$ ]] || die "LIMIT $limit: must be a whole number of seconds" 2
for tool in flwr flower-superlink ps; do
    command -v "$tool" >/dev/null || die "$tool is not on PATH; is fedsam's environment active?" 2
done
app=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$2"
keys=$(cd "$1" && pwd) work=$(cd "$2" && pwd)
public=("$keys"/node-*.pub)
nodes=${#public[@]}
pids=() names=() run=

# fedsam is installed already, and nothing is asked of or told to the outside
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export FLWR_DISABLE_UPDATE_CHECK=1 FLWR_TELEMETRY_ENABLED=0

start() { # NAME COMMAND...: in the background, with a log and a Flower home of its own
    local name=$1
    shift
    mkdir "$work/$name"
    FLWR_HOME="$work/$name" "$@" >"$work/$name.log" 2>&1 &
    pids+=($!) names+=("$name")
}

family() { # PID...: these and their descendants
    ps -eo pid=,ppid= | awk -v given="$*" '
        { parent[$1] = $2 }
        END {
            split(given, g, " "); for (i in g) ours[g[i]]
            do { grew = 0
                for (p in parent) if (!(p in ours) && parent[p] in ours) { ours[p]; grew = 1 }
            } while (grew)
            for (p in ours) print p
        }'
}

running() { ps -o stat= -p "$*" | grep -qv '^Z'; } # a zombie is not

stop() { # Flower's processes end with their parents, unless they hang: those are killed
    trap '' INT TERM
    [ ${#pids[@]} -gt 0 ] || return 0
    local all try
    all=$(family "${pids[@]}" $run)
    kill "${pids[@]}" $run 2>/dev/null || true
    for try in {1..60}; do
        sleep 0.2
        running $all || return 0
        all=$(family $all)
        [ "$try" -lt 50 ] || kill -KILL $all 2>/dev/null || true
    done
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

within() { # SECONDS WHAT COMMAND...: wait until the command succeeds
    local seconds=$1 what=$2 end=$((SECONDS + $1)) i
    shift 2
    until "$@" 2>/dev/null; do
        for i in "${!pids[@]}"; do
            kill -0 "${pids[i]}" 2>/dev/null || die "${names[i]} has ended; see $work/${names[i]}.log"
        done
        [ $SECONDS -lt $end ] || die "$what: not within $seconds s; logs are in $work"
        sleep 0.2
    done
}

healthy() { # says so under a certificate of ours: not just anything that listens there
    python3 - "https://$1/health" "$keys/ca.pem" <<'END'
import ssl, sys, urllib.request
trusted = ssl.create_default_context(cafile=sys.argv[2])
urllib.request.urlopen(sys.argv[1], timeout=10, context=trusted)
END
}
connected() { grep -q "SuperNode ID" "$work/$1.log"; }
ended() { ! kill -0 "$1"; }

# none that the system may give to whoever asks for any, before a server of ours has bound it
read -ra ports < <(
    python3 - $((nodes + 1)) <<'END'
import random, socket, sys
held = []
for port in random.sample(range(20000, 32000), 12000):
    try:
        held.append(socket.create_server(("127.0.0.1", port)))
    except OSError:
        continue
    if len(held) == int(sys.argv[1]):
        break
print(*(s.getsockname()[1] for s in held))
END
)
superlink=127.0.0.1:${ports[0]}

start superlink flower-superlink --host 127.0.0.1 --port "${ports[0]}" \
    --ssl-ca-certfile "$keys/ca.pem" --ssl-certfile "$keys/superlink.pem" \
    --ssl-keyfile "$keys/superlink.key" --enable-supernode-auth
within 60 "the SuperLink" healthy "$superlink"

export FLWR_HOME=$work/cli
mkdir "$FLWR_HOME"
cat >"$FLWR_HOME/config.toml" <<END
[superlink.deployment]
address = "$superlink"
root-certificates = "$keys/ca.pem"
END
for ((k = 0; k < nodes; k++)); do
    flwr supernode register "$keys/node-$k.pub" deployment
    start "node-$k" flower-supernode --superlink "$superlink" --port "${ports[k + 1]}" \
        --root-certificates "$keys/ca.pem" --auth-supernode-private-key "$keys/node-$k" \
        --node-config "partition-id=$k num-partitions=$nodes"
done
for ((k = 0; k < nodes; k++)); do
    within 60 "SuperNode $k" connected "node-$k"
done

config="clients=$nodes clients-per-round=$nodes alpha=1.0 rounds=3 eval-every=1
    algorithm=\"fedasam\" swa=true swa-start=1 swa-cycle=1 out=\"$work/run\"
    node-keys=\"$keys/partitions\""
flwr run "$app" deployment --stream --run-config "$config" --run-config "${3:-}" &
run=$!
within "$limit" "the run" ended "$run"
status=$(flwr list deployment --format json |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["runs"][0]["status"])')
[ "$status" = finished:completed ] || die "the run ended as $status; see $work/superlink.log"
echo "the run ended as $status; logs are in $work"
