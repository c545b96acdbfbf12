# shellcheck shell=bash disable=SC2034,SC2154 # what it sets and reads is setup_env.sh's
# Sourced by setup_env.sh and wheels.sh: an environment on top of a Python that has its own torch, as
# containers and clusters have. Only what that Python lacks is installed, and its torch stays.

mode="system torch"
min_free_gb=${SEQ1F1B_SETUP_MIN_GB:-1}
wheels=${SEQ1F1B_WHEELS:-}
if [[ -n $wheels ]]; then
  wheels=$(cd "$wheels" 2>/dev/null && pwd) ||
    die "SEQ1F1B_WHEELS=$SEQ1F1B_WHEELS: no such folder" \
      "Make one where there is a network: bash tools/wheels.sh FOLDER"
fi

# The first Python with a torch: the one that is named, else those on PATH.
find_python() {
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    usable "$PYTHON" && has_torch "$PYTHON" && base_python=$(command -v "$PYTHON") && return
    die "PYTHON=$PYTHON cannot be used${rejected[0]:+ (${rejected[0]})}" \
      "SEQ1F1B_SYSTEM_TORCH=1 asks for a Python $versions that has torch."
  fi
  for candidate in python3 python python3.12 python3.13; do
    usable "$candidate" && has_torch "$candidate" && base_python=$(command -v "$candidate") && return
  done
  die "SEQ1F1B_SYSTEM_TORCH=1: no Python $versions here has torch" \
    ${rejected[@]+"${rejected[@]}"} \
    "Name the one that has: PYTHON=/path/to/python3, or unset SEQ1F1B_SYSTEM_TORCH."
}

# Without pip where the system has it: Debian's Python comes without ensurepip. An environment on
# top of another does not see what that holds, which a path file mends.
make_venv() {
  local own=()
  "$base_python" -m pip --version >/dev/null 2>&1 && own=(--without-pip)
  phase "making $venv on $base_python" \
    "$base_python" -m venv --system-site-packages ${own[@]+"${own[@]}"} "$venv" &&
    "$base_python" -c '
import pathlib, site, sys, sysconfig
if sys.prefix != sys.base_prefix:
    (folder,) = pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages")
    paths = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (folder / "system_torch.pth").write_text("\n".join(paths) + "\n")' "$venv" &&
    : >"$venv/.system-torch"
}

# list_lacking: writes the pins of what is lacking, and of what must stay as it is.
list_lacking() {
  "$venv_python" "$root/tools/lacking.py" "$temporary/lacking.txt" "$temporary/kept.txt" 2>&1 |
    tee -a "$log" | sed 's/^/  /' >&2
  ((PIPESTATUS[0] == 0))
}

pip_install() {
  local label=$1
  shift
  if [[ -n $wheels ]]; then
    phase "$label from $wheels" "$venv_python" -m pip install --no-index --find-links "$wheels" "$@"
  else
    phase "$label" "$venv_python" -m pip install "$@"
  fi
}

# collect FOLDER: downloads what would be installed, and ends.
collect() {
  local needed=$temporary/needed.txt
  phase "finding out what it needs" "$venv_python" -m pip install --dry-run --quiet \
    --report "$temporary/report.json" -r "$temporary/lacking.txt" -c "$temporary/kept.txt" ||
    explain_failure
  "$venv_python" -c '
import json, sys
for item in json.load(open(sys.argv[1]))["install"]:
    print("{name}=={version}".format(**item["metadata"]))' "$temporary/report.json" >"$needed" ||
    explain_failure
  phase "downloading $(wc -l <"$needed") wheels into $1" "$venv_python" -m pip download \
    --only-binary :all: --no-deps --dest "$1" -r "$needed" || explain_failure
  say "$1 has $(du -sm --exclude '.making*' "$1" | cut -f 1) MiB. On a machine without a network:"
  say "  SEQ1F1B_WHEELS=$1 bash $root/benchmarks/gpu.sh"
  exit 0
}

install_packages() {
  list_lacking || die "this torch environment cannot be built on" \
    "Name another Python (PYTHON=...), or unset SEQ1F1B_SYSTEM_TORCH to install a torch."
  [[ -n ${SEQ1F1B_COLLECT:-} ]] && collect "$SEQ1F1B_COLLECT"
  pip_install "installing what it lacks" -r "$temporary/lacking.txt" -c "$temporary/kept.txt" &&
    phase "installing the project" \
      "$venv_python" -m pip install --no-index --no-deps --no-build-isolation -e "$root"
}
