#!/usr/bin/env bash
# Trains a GPT under 1F1B and Seq1F1B and compares them: the authors' sweep as one command.
# `bash exp.sh --help` lists the settings; with none it takes what suits this machine.
set -uo pipefail
unset CDPATH PYTHONHOME

source=${BASH_SOURCE[0]}
while [[ -L $source ]]; do
  target=$(readlink "$source")
  [[ $target == /* ]] || target=$(dirname "$source")/$target
  source=$target
done
root=$(cd -P "$(dirname "$source")" && pwd)
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  # needs nothing installed, where the system's Python is not too old
  python3 "$root/seq1f1b_tools/sweep" --help 2>/dev/null && exit
fi
python=$(bash "$root/tools/setup_env.sh") || exit 1
exec "$python" "$root/seq1f1b_tools/sweep" "$@"
