#!/usr/bin/env bash
# Runs the tests, after setting up what they need; with --all also those that take minutes.
# Other arguments go to pytest; paths are relative to the repository.
set -uo pipefail
unset CDPATH PYTHONHOME

source=${BASH_SOURCE[0]}
while [[ -L $source ]]; do
  target=$(readlink "$source")
  [[ $target == /* ]] || target=$(dirname "$source")/$target
  source=$target
done
root=$(cd -P "$(dirname "$source")/.." && pwd)
python=$(bash "$root/tools/setup_env.sh") || exit 1
cd "$root" && exec "$python" -m pytest "$@"
