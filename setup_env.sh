# Sourced by run.sh and run_tests.sh.

fail() {
  echo "error: $*" >&2
  exit 2
}

# Prints the first Python that is new enough.
find_python() {
  local python
  for python in python3 python3.11 python3.12 python3.13 python3.14 python; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  return 1
}

# setup_env CHECKOUT makes its .venv hold what requirements.txt says. The copy of requirements.txt
# inside it is written last: an interrupted setup lacks it, and an outdated one differs from it.
setup_env() {
  local venv="$1/.venv" wanted="$1/requirements.txt" python
  cmp -s "$wanted" "$venv/requirements.txt" && return
  [ -f "$wanted" ] || fail "$wanted is missing; the checkout is incomplete"
  python="$(find_python)" || fail "Python 3.11 or newer is needed, and none is on the PATH"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python lacks venv or pip; on Debian and Ubuntu: apt install python3-venv"
  echo "setting up .venv from requirements.txt (once; this takes some minutes)" >&2
  "$python" -m venv "$venv" >&2 || fail "cannot create $venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$wanted" >&2 ||
    fail "installing requirements.txt failed, see above; run again to go on"
  cp "$wanted" "$venv/requirements.txt.part"
  mv "$venv/requirements.txt.part" "$venv/requirements.txt"
}
