#!/bin/sh
# Prints the path of a Python >= 3.12 that can make virtual environments; the oldest such
# version wins, because constraints.txt was made with 3.12. Looks, in this order, at
# $PYTHON, the usual names on PATH, pyenv's versions and what uv knows. Every candidate is
# run: pyenv leaves commands on PATH for versions that are not switched on, and Debian
# ships a python3 that lacks ensurepip.
set -u

probe='import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2], sys.executable)'

candidates() {
    for name in python3.12 python3.13 python3.14 python3 python; do
        command -v "$name"
    done
    ls "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/python3 2>/dev/null
    uv python find '>=3.12' 2>/dev/null
}

if [ -n "${PYTHON:-}" ]; then
    list=$PYTHON
else
    list=$(candidates)
fi

best=$(
    printf '%s\n' "$list" | while IFS= read -r python; do
        "$python" -c "$probe" </dev/null 2>/dev/null
    done | sort -s -t . -k 1,1n -k 2,2n | while read -r version path; do
        if [ "${version%%.*}" -eq 3 ] && [ "${version#*.}" -ge 12 ]; then
            printf '%s\n' "$path"
            break
        fi
    done
)

if [ -z "$best" ]; then
    cat >&2 <<'END'
No usable Python 3.12 or newer was found on PATH, among pyenv's versions or by uv.
Install one of these, then run the same command again:
  Debian 13, Ubuntu 24.04 or newer   apt-get install python3 python3-venv
  macOS                              brew install python@3.12
  pyenv                              pyenv install 3.12
  uv                                 uv python install 3.12
or name one that you have: make setup PYTHON=/path/to/python3
END
    exit 1
fi
printf '%s\n' "$best"
