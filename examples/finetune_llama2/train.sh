#!/usr/bin/env bash
# bash train.sh [SETTINGS.yaml]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python}" "$here/fine_tune.py" "${1:-$here/fine_tune.yaml}"
