#!/bin/sh
# Makes .venv, or mends one whose interpreter is gone, and installs the project into it
# with every version that constraints.txt pins. VENV and EXTRAS name another one.
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}

probe='import sys; sys.exit(sys.version_info < (3, 12))'
if ! "$venv/bin/python" -c "$probe" 2>/dev/null; then
    python=$(sh tools/find_python.sh)
    echo "making $venv with $python"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
echo "installing what constraints.txt pins (a few minutes the first time)"
"$venv/bin/python" -m pip install --quiet -e ".[${EXTRAS:-test,notebooks}]" -c constraints.txt
