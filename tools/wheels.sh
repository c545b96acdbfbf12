#!/usr/bin/env bash
# Makes a folder of wheels for machines without a network, which have a Python with torch:
#
#     bash tools/wheels.sh FOLDER                          # where there is a network
#     SEQ1F1B_WHEELS=FOLDER bash benchmarks/gpu.sh         # where there is none
#
# It holds what the project needs and that Python lacks. Run it on a machine with the same Python
# packages as those without a network, such as a cluster's login node or the same container.
# PYTHON names the Python with torch; without it the first on PATH that has one is taken.
set -uo pipefail
unset CDPATH

source=${BASH_SOURCE[0]}
while [[ -L $source ]]; do
  target=$(readlink "$source")
  [[ $target == /* ]] || target=$(dirname "$source")/$target
  source=$target
done
here=$(cd -P "$(dirname "$source")" && pwd)
if (($# != 1)) || [[ $1 == -* ]]; then
  printf 'usage: [PYTHON=/path/to/python] bash tools/wheels.sh FOLDER\n' >&2
  exit 2
fi
mkdir -p "$1" && folder=$(cd "$1" && pwd) || exit 1
scratch=$(mktemp -d "$folder/.making.XXXXXX") || exit 1
trap 'rm -rf "$scratch"' EXIT
SEQ1F1B_VENV=$scratch/venv SEQ1F1B_SYSTEM_TORCH=1 SEQ1F1B_COLLECT=$folder \
  bash "$here/setup_env.sh" >/dev/null
