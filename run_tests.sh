#!/usr/bin/env bash
# usage: ./run_tests.sh [pytest arguments]
# Runs the tests on the CPU, setting up .venv when needed; all of them in two processes.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$root/setup_env.sh"
setup_env "$root"
cd "$root"
export JAX_PLATFORMS=cpu
[ $# -gt 0 ] || set -- -n 2 --dist loadfile
exec .venv/bin/python -m pytest "$@"
