#!/usr/bin/env bash
# Installs the wheels of .whl/ into $HOME/site and runs measure.py: bash experiments/gpu/bare.sh OUT [options]
set -u
cd "$(dirname "$0")/../.."
if compgen -G ".whl/*.whl" > /dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$HOME/site" .whl/*.whl || exit 1
fi
export PYTHONPATH="$HOME/site:$PWD" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec python3 experiments/gpu/measure.py --out "$@"
