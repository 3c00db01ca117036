#!/usr/bin/env bash
# Runs a paper of projects/ or a command of apps/; see usage below.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$root/setup_env.sh"

usage() {
  cat <<'END'
usage: ./run.sh PAPER [flags]      run a paper; ./run.sh PAPER --help shows its flags and presets
       ./run.sh list               list the papers
       ./run.sh reproduce [PAPER ...] [flags]
                                   run many papers and write one HTML page
       ./run.sh APP [flags]        run apps/APP.py
The first run installs requirements.txt into .venv.
END
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  "") usage >&2; exit 2 ;;
esac

name="$1"
shift
names=()
module=""
for file in "$root"/apps/*.py "$root"/projects/*/main.py; do
  [ -e "$file" ] || continue
  case "$file" in
    "$root"/apps/*) found="$(basename "$file" .py)"; path="apps.$found" ;;
    *) found="$(basename "$(dirname "$file")")"; path="projects.$found.main" ;;
  esac
  names+=("$found")
  if [ "$found" = "$name" ]; then module="$path"; fi
done

if [ -z "$module" ]; then
  python="$(find_python)" || fail "there is no paper or app $name; see ./run.sh list"
  near="$("$python" -c 'import difflib, sys
print(" or ".join(difflib.get_close_matches(sys.argv[1], sys.argv[2:])))' "$name" "${names[@]}")"
  fail "there is no paper or app '$name'; ${near:+did you mean $near? }see ./run.sh list"
fi

setup_env "$root"
# The user stays in their own folder, so that relative paths in flags mean what they say; -P keeps
# that folder's files from shadowing modules.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$root/.venv/bin/python" -P -m "$module" "$@"
