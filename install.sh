#!/usr/bin/env bash
# Installs mohawk-nas from this clone into the Python environment that is active.
#
#   ./install.sh          the tool
#   ./install.sh dev      and what its tests need (any extra of pyproject.toml, comma-separated)
#
# A torch that is there already is left alone. Otherwise a build that fits the machine is chosen: a
# plain `pip install torch` would bring gigabytes of CUDA libraries to a machine without a GPU.
set -euo pipefail
cd "$(dirname "$0")"

if ! python -c 'import torch' 2>/dev/null; then
    # uv knows which builds there are, and looks for a GPU; pip takes what the machine is set up for.
    python -m pip install --quiet uv
    python -m uv pip install --quiet --torch-backend=auto 'torch>=2.6' 2>/dev/null ||
        python -m pip install --quiet 'torch==2.13.0'
fi
python -m pip install --quiet --editable ".${1:+[$1]}"
