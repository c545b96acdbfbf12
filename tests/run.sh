#!/usr/bin/env bash
# Runs the tests, after setting up what they need; with --all also those that take minutes.
# Other arguments go to pytest; paths are relative to the repository. Files of tests run side by side
# in as many processes as the machine has room for; --numprocesses 0 runs them one after the other.
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
if [[ " $* " == *" --all "* ]] && ! "$python" -c \
  'import importlib.util as util, sys; sys.exit(not util.find_spec("deepspeed"))'; then
  # it compiles against the torch that is installed, so it cannot be among the pins
  "$python" -m pip install --quiet --no-build-isolation "deepspeed==0.19.8" >&2 ||
    printf 'DeepSpeed could not be installed: tests that compare with it are skipped\n' >&2
fi
export PYTEST_ADDOPTS="--numprocesses auto --dist loadfile --no-loadscope-reorder ${PYTEST_ADDOPTS-}"
cd "$root" && exec "$python" -m pytest "$@"
