#!/usr/bin/env bash
# usage: ./run_tests.sh [pytest arguments]
# Runs the tests on the CPU, setting up .venv when needed.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$root/setup_env.sh"
setup_env "$root"
cd "$root"
export JAX_PLATFORMS=cpu
exec .venv/bin/python -m pytest "$@"
