#!/usr/bin/env bash
# Makes .venv with Hartist in it, installed in place. Usage: scripts/setup.sh [EXTRAS]   (e.g. "test,train")
# Does nothing if that has been done since pyproject.toml last changed.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-}"
stamp=".venv/.installed-${extras:-core}"
if [ -f "$stamp" ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt scripts/setup.sh ]; then exit 0; fi

python=""
for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
  if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python="$candidate"
    break
  fi
done
if [ -z "$python" ]; then
  echo "setup: Python 3.11 or newer is needed; install it (Debian: apt-get install python3 python3-venv) or set PYTHON" >&2
  exit 1
fi

if [ ! -x .venv/bin/pip ]; then
  rm -rf .venv
  if ! "$python" -m venv .venv 2>/dev/null; then
    # Debian ships Python without ensurepip
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
      echo "setup: installing python3-venv"
      apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null
      rm -rf .venv
      "$python" -m venv .venv
    else
      echo "setup: cannot make a virtual environment; install it first: sudo apt-get install python3-venv" >&2
      exit 1
    fi
  fi
fi
echo "setup: installing Hartist${extras:+ with $extras} into .venv (PyTorch is large; the first time takes a while)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
touch "$stamp"
