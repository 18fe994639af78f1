#!/bin/sh
# Runs a command beside a Slurm of this one machine, which it installs, starts and stops:
#   sh tests/slurm/cluster.sh COMMAND ...
# For Debian and Ubuntu, as root or with sudo. The command finds it by SLURM_CONF.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
host=$(hostname -s)
folder=$(mktemp -d)
PATH="$PATH:/usr/sbin:/sbin"
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -E "$@"; fi; }

install() {
    for tool in sbatch slurmctld slurmd munged; do
        command -v $tool >/dev/null || missing=$tool
    done
    [ -n "${missing:-}" ] || return 0
    as_root apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -q -y --no-install-recommends slurm-wlm munge
}

start_munge() {
    munge -n 2>/dev/null | unmunge >/dev/null 2>&1 && return
    as_root mkdir -p /run/munge
    as_root chown munge:munge /run/munge
    as_root chmod 755 /run/munge
    as_root runuser -u munge -- munged
}

start() {
    chmod 755 "$folder"
    mkdir "$folder/state" "$folder/spool"
    sed "s|HOST|$host|g; s|FOLDER|$folder|g" "$here/slurm.conf" >"$folder/slurm.conf"
    export SLURM_CONF="$folder/slurm.conf"
    as_root slurmctld -f "$SLURM_CONF"
    as_root slurmd -f "$SLURM_CONF" -N "$host"
    for _ in $(seq 60); do
        if sinfo -h -o %T 2>/dev/null | grep -q idle; then return; fi
        sleep 0.5
    done
    echo "error: no idle node after 30 s" >&2
    sinfo >&2
    exit 1
}

stop() {
    code=$?
    [ $code = 0 ] || cat "$folder"/*.log >&2
    for daemon in slurmd slurmctld; do
        if [ -f "$folder/$daemon.pid" ]; then
            # One may have ended by itself.
            as_root kill "$(cat "$folder/$daemon.pid")" 2>/dev/null || true
        fi
    done
    sleep 1
    as_root rm -rf "$folder"
    exit $code
}

install
start_munge
trap stop EXIT
start
"$@"
