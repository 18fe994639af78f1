#!/bin/sh
# Makes .cache/peers, once: a Python 3.11 environment with what benchmarks compare us to.
# It stands apart because its versions and ours do not go together.
set -eu
cd "$(dirname "$0")/.."

torch=2.13.0 transformers=5.23.0
ready="import torch, transformers as t
assert (torch.__version__.split('+')[0], t.__version__) == ('$torch', '$transformers')"
.cache/peers/bin/python -c "$ready" 2>/dev/null && exit

pyenv=${PYENV_ROOT:-${HOME:-}/.pyenv}
for python in python3.11 "$pyenv"/versions/3.11*/bin/python3.11; do
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "making .cache/peers with $python: torch and transformers, a few minutes" >&2
        rm -rf .cache/peers
        "$python" -m venv .cache/peers
        exec .cache/peers/bin/python -m pip install --quiet \
            "torch==$torch" "transformers==$transformers" >&2
    fi
done
echo "PyTorch and transformers need Python 3.11: there is none on PATH or among pyenv's versions" >&2
exit 1
