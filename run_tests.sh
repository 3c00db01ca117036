#!/usr/bin/env bash
# usage: ./run_tests.sh [pytest arguments]
# Runs the tests on the CPU, setting up .venv when needed.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$root/setup_env.sh"
setup_env "$root"
cd "$root"
# A machine without a TPU may have libtpu, for its compiler; these keep it from looking for one.
cache="${FLAXWORKS_CACHE:-$HOME/.cache/flaxworks}/xla"
export JAX_COMPILATION_CACHE_DIR="$cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2 TPU_ACCELERATOR_TYPE=v5litepod-4 \
  TPU_WORKER_HOSTNAMES=localhost TPU_SKIP_MDS_QUERY=1
exec .venv/bin/python -m pytest "$@"
