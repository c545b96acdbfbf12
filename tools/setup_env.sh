#!/usr/bin/env bash
# Leaves a ready virtual environment and prints the path of its Python on stdout; progress and
# errors go to stderr.
#
#     python=$(bash tools/setup_env.sh) || exit 1
#
# Does nothing when the environment already matches requirements.txt, its lock and pyproject.toml.
# Settings, all optional:
#     PYTHON                 the interpreter to build the environment with
#     SEQ1F1B_VENV           where the environment goes (default: .venv beside this folder)
#     SEQ1F1B_SETUP_MIN_GB   free disk space asked for before a first install
#     SEQ1F1B_SYSTEM_TORCH   1: build on the torch of the Python, as in a container that has one
#     SEQ1F1B_WHEELS         a folder made by tools/wheels.sh: install from it without a network
set -uo pipefail
unset CDPATH PYTHONHOME PYTHONPATH
# what containers and users set for their own installs, and would bend or break this one
unset PIP_CONSTRAINT PIP_BUILD_CONSTRAINT PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_DRY_RUN \
  PIP_NO_DEPS PIP_REQUIREMENT PIP_EDITABLE PIP_REQUIRE_HASHES PIP_PLATFORM PIP_PYTHON_VERSION \
  UV_CONSTRAINT UV_OVERRIDE UV_BUILD_CONSTRAINT UV_SYSTEM_PYTHON UV_PROJECT_ENVIRONMENT
export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1

source=${BASH_SOURCE[0]}
while [[ -L $source ]]; do
  target=$(readlink "$source")
  [[ $target == /* ]] || target=$(dirname "$source")/$target
  source=$target
done
root=$(cd -P "$(dirname "$source")/.." && pwd)
venv=${SEQ1F1B_VENV:-$root/.venv}
venv=${venv%/}
[[ $venv == /* ]] || venv=$PWD/$venv
min_free_gb=${SEQ1F1B_SETUP_MIN_GB:-9}
minors="12 13" # Megatron-Core publishes wheels for these versions of Python 3 only
versions="3.12 or 3.13"

venv_python=$venv/bin/python
stamp=$venv/.stamp
log=$venv/seq1f1b-install.log # also marks the environment as made by this script
temporary=$venv/tmp           # on the disk whose free space is checked; /tmp may be small
child=""
started=$SECONDS
mode="" # what else than the pins the environment depends on

say() { printf 'setup: %s\n' "$*" >&2; }

die() {
  printf 'setup: error: %s\n' "$1" >&2
  shift
  (($#)) && printf '  %s\n' "$@" >&2
  exit 1
}

interrupted() {
  if [[ -n $child ]]; then
    kill -TERM -- "-$child" 2>/dev/null
    wait "$child" 2>/dev/null
  fi
  printf '\nsetup: interrupted; run the same command again to go on\n' >&2
  exit "$1"
}
trap 'interrupted 130' INT
trap 'interrupted 143' TERM
trap 'interrupted 129' HUP

# phase LABEL COMMAND...: runs the command, its output in the log; one line with the time it took.
phase() {
  local label=$1 start=$SECONDS status
  shift
  printf 'setup: %s ... ' "$label" >&2
  printf '\n$ %s\n' "$*" >>"$log"
  set -m # a process group of its own, so that an interrupt ends what the command started too
  TMPDIR=$temporary "$@" >>"$log" 2>&1 </dev/null &
  child=$!
  set +m
  while [[ -t 2 ]] && kill -0 "$child" 2>/dev/null; do
    printf '\rsetup: %s ... %d s ' "$label" $((SECONDS - start)) >&2
    sleep 0.5
  done
  wait "$child"
  status=$?
  child=""
  [[ -t 2 ]] && printf '\rsetup: %s ... ' "$label" >&2
  printf '%d s%s\n' $((SECONDS - start)) "$( ((status)) && printf ', failed')" >&2
  return "$status"
}

# ---- finding a Python ----------------------------------------------------------------------------

rejected=()
describe='
import importlib.util as util, sys, sysconfig
print(".".join(map(str, sys.version_info[:3])),
      sys.implementation.name,
      "free-threaded" if sysconfig.get_config_var("Py_GIL_DISABLED") else "usual",
      "venv" if util.find_spec("venv") and util.find_spec("ensurepip") else "none",
      getattr(sys, "_base_executable", None) or sys.executable,
      sep="|")'

# usable CANDIDATE: runs it, since a version in a name or a pyenv shim promises nothing.
# Sets base_python and base_version, or adds the reason to the rejected.
usable() {
  local version implementation threads packager executable minor path
  path=$(command -v "$1") || return 1
  IFS='|' read -r version implementation threads packager executable \
    < <("$path" -c "$describe" 2>/dev/null </dev/null)
  if [[ -z $version ]]; then
    rejected+=("$path: does not run")
    return 1
  fi
  minor=${version#*.}
  minor=${minor%%.*}
  if [[ $version != 3.* || " $minors " != *" $minor "* ]]; then
    rejected+=("$path: Python $version, not $versions")
  elif [[ $implementation != cpython || $threads != usual ]]; then
    rejected+=("$path: a $threads build of $implementation, not the usual CPython")
  elif [[ $packager != venv ]] && ! command -v uv >/dev/null; then
    rejected+=("$path: lacks venv or ensurepip (Debian, Ubuntu: apt install python3.$minor-venv)")
  else
    base_python=$executable base_version=$version
    return 0
  fi
  return 1
}

find_python() {
  local minor candidate pyenv_root
  if [[ -n ${PYTHON:-} ]]; then
    usable "$PYTHON" && return
    die "PYTHON=$PYTHON cannot be used${rejected[0]:+ (${rejected[0]})}" \
      "It must be a Python $versions; unset PYTHON to let the set-up look for one."
  fi
  for minor in $minors; do
    usable "python3.$minor" && return
  done
  usable python3 && return
  usable python && return
  pyenv_root=${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo "${HOME:-/root}/.pyenv")}
  for minor in $minors; do
    for candidate in "$pyenv_root/versions/3.$minor".*/bin/python3; do
      [[ -x $candidate ]] && usable "$candidate" && return
    done
  done
  if command -v uv >/dev/null; then
    for minor in $minors; do
      candidate=$(uv python find --system "3.$minor" 2>/dev/null) && usable "$candidate" && return
    done
    say "no Python $versions here: fetching one with uv"
    minor=${minors%% *}
    uv python install "3.$minor" >&2 &&
      candidate=$(uv python find --system "3.$minor") && usable "$candidate" && return
  fi
  die "no usable Python found: Python $versions is needed" \
    ${rejected[@]+"${rejected[@]}"} \
    "Do one of these, then run the same command again:" \
    "  - install uv (https://docs.astral.sh/uv), which fetches a Python by itself" \
    "  - pyenv install 3.12, or the system's package (Debian, Ubuntu: python3.12-venv)" \
    "  - name one: PYTHON=/path/to/python3.12"
}

# ---- the stamp -----------------------------------------------------------------------------------

# Two lines: the folders (scripts in the environment hold absolute paths), and a hash of the pins
# and the Python.
wanted_stamp() {
  "$venv_python" -I -S -c '
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256((sys.version + sys.argv[3]).encode())
for name in ("requirements.txt", "requirements.lock", "pyproject.toml", "setup.py"):
    if (root / name).exists():
        digest.update((root / name).read_bytes())
print(root, sys.argv[2])
print(digest.hexdigest())' "$root" "$venv" "$mode" 2>/dev/null </dev/null
}

up_to_date() {
  local want
  [[ -f $stamp ]] && want=$(wanted_stamp) && [[ $want == "$(<"$stamp")" ]]
}

# Whether the environment can be brought up to date in place. Without a stamp an install of ours was
# cut short, and packages may be half there: only a fresh start is safe. What somebody else made, or
# another clone of this project, is never deleted while it works.
keeps_environment() {
  local owner made
  [[ -d $venv && -n $(ls -A "$venv") ]] || return 1
  if [[ -f $stamp ]]; then
    owner=$(head -n 1 "$stamp")
    if [[ $owner != "$root $venv" && $owner == *" $venv" && -f ${owner%" $venv"}/tools/setup_env.sh ]]; then
      die "$venv is the environment of another clone, ${owner%" $venv"}" \
        "Set SEQ1F1B_VENV to another folder, or leave it unset: then each clone has its own."
    fi
  fi
  if [[ ! -f $venv/pyvenv.cfg && ! -f $log ]]; then
    die "$venv exists and is not a virtual environment" \
      "Move it away, or set SEQ1F1B_VENV to another folder."
  fi
  wanted_stamp >/dev/null || return 1
  [[ -n $mode ]] && made=system || made=own
  if [[ -f $log ]]; then
    [[ $made == $([[ -f $venv/.system-torch ]] && echo system || echo own) ]] || return 1
    [[ -f $stamp && "$root $venv" == "$(head -n 1 "$stamp")" ]] && usable "$venv_python"
  else
    usable "$venv_python" ||
      die "$venv was made by someone else and does not fit (${rejected[0]:-})" \
        "Move it away, or set SEQ1F1B_VENV to another folder."
  fi
}

# ---- installing ----------------------------------------------------------------------------------

needs_writing='Set SEQ1F1B_VENV to a folder you may write to.'
needs_space='Free some space, or set SEQ1F1B_VENV to a folder on a larger disk.'

check_free_space() {
  local free_kb
  free_kb=$(df -Pk "$(dirname "$venv")" 2>/dev/null | awk 'NR == 2 { print $4 }')
  if [[ -n $free_kb ]] && ((free_kb < min_free_gb * 1024 * 1024)); then
    die "$((free_kb / 1024 / 1024)) GB free on the disk of $venv, $min_free_gb GB needed" \
      "torch brings its CUDA libraries. $needs_space"
  fi
}

ended_with() { tail -n 40 "$log" | grep -qiE "$1"; }

disk_full() { ended_with 'No space left on device|os error 28|Disk quota exceeded'; }

no_network() {
  ended_with 'name resolution|dns error|Max retries|NewConnectionError|Failed to establish' ||
    ended_with 'unreachable|Connection refused|timed out|error sending request|ProxyError|SSLError'
}

explain_failure() {
  local reason advice
  if disk_full; then
    reason="the disk is full"
    advice="$needs_space pip and uv also keep a cache in ~/.cache."
  elif no_network; then
    reason="the package index could not be reached"
    advice="Check the network. Behind a proxy set HTTPS_PROXY; for a mirror set PIP_INDEX_URL."
  elif ended_with 'No matching distribution|No solution found'; then
    reason="the package index has no file for this machine of a version in requirements.txt"
    advice="Needed: Linux on x86-64 or ARM, Python $versions, an index with the pinned versions."
  elif ended_with 'DO NOT MATCH THE HASHES|Hash mismatch'; then
    reason="the package index has another file than the one that requirements.lock names"
    advice="Use another index (PIP_INDEX_URL), or remove requirements.lock to trust this one."
  else
    reason="installing failed"
    advice="The last lines of the log say why."
  fi
  printf '  last lines of %s:\n' "$log" >&2
  tail -n 15 "$log" | sed 's/^/    /' >&2
  die "$reason" "$advice" "Then run the same command again."
}

# The lock, which has every package with its hashes, unless the pins have changed since it was made.
choose_pins() {
  local changed
  pins=$root/requirements.txt
  [[ -f $root/requirements.lock ]] || return 0
  changed=$(grep '==' "$pins" | grep -vxFf <(sed 's/[ ;].*//' "$root/requirements.lock"))
  if [[ -z $changed ]]; then
    pins=$root/requirements.lock
  else
    say "requirements.lock lacks ${changed//$'\n'/, }: installing without hashes"
  fi
}

# uv installs in a fraction of pip's time. Where pip is set to another index, none or a proxy, which
# uv would not use, nothing is fetched.
fetch_uv() {
  command -v uv >/dev/null && return
  local pin=$temporary/uv.txt
  awk '/^uv==/ { found = 1 } found { print; if (!/\\$/) exit }' "$pins" >"$pin"
  [[ -s $pin ]] || return 1
  "$venv_python" -m pip config list 2>>"$log" | grep -qE '\.(index-url|no-index|proxy)=' && return 1
  phase "fetching uv" "$venv_python" -m pip install -r "$pin" && PATH=$PATH:$venv/bin
}

install_with_uv() {
  fetch_uv &&
    phase "installing the pinned packages with uv (about 3 GB the first time)" \
      uv pip install --compile-bytecode --python "$venv_python" -r "$pins" &&
    phase "installing the project" \
      uv pip install --python "$venv_python" --no-deps --no-build-isolation -e "$root"
}

install_with_pip() {
  # uv makes environments without pip
  "$venv_python" -m pip --version >>"$log" 2>&1 ||
    "$venv_python" -m ensurepip >>"$log" 2>&1 || return
  phase "installing the pinned packages with pip (about 3 GB the first time)" \
    "$venv_python" -m pip install -r "$pins" &&
    phase "installing the project" \
      "$venv_python" -m pip install --no-deps --no-build-isolation -e "$root"
}

start_log() {
  { mkdir -p "$temporary" && : >"$log"; } 2>/dev/null ||
    die "cannot write to $venv" "$needs_writing"
  trap 'rm -rf "$temporary"' EXIT
}

# Renamed first: deleting takes seconds, and half an environment could not be told from other things.
discard_environment() {
  rm -rf "$venv.discarded"
  [[ ! -d $venv ]] || mv "$venv" "$venv.discarded" || die "cannot write to $venv" "$needs_writing"
  rm -rf "$venv.discarded"
}

make_venv() {
  if command -v uv >/dev/null; then
    phase "making $venv" uv venv --allow-existing --python "$base_python" "$venv"
  else
    phase "making $venv" "$base_python" -m venv "$venv"
  fi
}

# uv knows nothing of pip's settings: where only those name the index, pip still gets through.
install_packages() {
  choose_pins
  install_with_uv || { ! disk_full && install_with_pip; }
}

has_torch() {
  "$1" -c 'import importlib.util as util, sys; sys.exit(not util.find_spec("torch"))' \
    2>/dev/null </dev/null
}

make_environment() {
  find_python
  discard_environment
  check_free_space
  start_log
  say "Python $base_version ($base_python)"
  if [[ -z $mode ]] && has_torch "$base_python"; then
    say "it has a torch of its own: SEQ1F1B_SYSTEM_TORCH=1 builds on that one instead"
  fi
  make_venv || explain_failure
}

take_lock() {
  { mkdir -p "$(dirname "$venv")" && exec 9>"$venv.lock"; } 2>/dev/null ||
    die "cannot write to $(dirname "$venv")" "$needs_writing"
  command -v flock >/dev/null || return 0
  # A file system that cannot lock gives another status than 75: there is nothing to wait for then.
  flock -n -E 75 9
  if (($? == 75)); then
    say "waiting for another set-up of $venv"
    set -m
    flock 9 &
    child=$!
    set +m
    wait "$child"
    child=""
  fi
}

set_up() {
  take_lock
  up_to_date && return # made meanwhile by the one waited for
  if keeps_environment; then
    start_log
    say "bringing $venv up to date"
  else
    make_environment
  fi
  rm -f "$stamp"
  install_packages || explain_failure
  phase "checking it" "$venv_python" -c 'import torch, megatron.core, seq1f1b' || explain_failure
  { wanted_stamp >"$stamp.new" && mv "$stamp.new" "$stamp"; } || die "cannot write $stamp"
  say "ready after $((SECONDS - started)) s"
}

system_torch=${SEQ1F1B_SYSTEM_TORCH:-}
[[ -z $system_torch && ( -n ${SEQ1F1B_WHEELS:-} || -f $venv/.system-torch ) ]] && system_torch=1
# shellcheck source=tools/system_torch.sh
[[ $system_torch == 1 ]] && source "$root/tools/system_torch.sh"
up_to_date || set_up
printf '%s\n' "$venv_python"
