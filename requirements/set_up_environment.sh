#!/bin/sh
# Create or update the virtual environment that `make` uses.
#
#   requirements/set_up_environment.sh VENV [PYTHON]
#
# Without PYTHON it takes the first Python on PATH that runs, is supported (TESTED in
# moco_common/version.py) and has the venv module. A failure ends in one line that says what to do,
# and the next call continues from there; an installation that was killed is redone from scratch.
set -u
cd "$(dirname "$0")/.." || exit 1
venv=$1
chosen=${2:-}
unfinished=$venv/.unfinished # exists while pip writes, and so after a kill
trap 'echo "stopped: run make again, which redoes the installation" >&2; exit 130' INT TERM

# Prints the version of the Python that runs it, "ok" or what is wrong, and the supported range.
probe='
import runpy, sys
first, last = runpy.run_path("moco_common/version.py")["TESTED"]["python"]
oldest, newest = [tuple(map(int, version.split("."))) for version in (first, last)]
state = "ok"
try:
    import venv, ensurepip
except ImportError:
    state = "no-venv"
if not oldest <= sys.version_info[:2] <= newest:
    state = "unsupported"
print("%d.%d" % sys.version_info[:2], state, first, last)
'

fail() {
    echo "error: $1" >&2
    exit 1
}

printed() { printf '%s\n' "$output" | grep -q -i -E "$1"; }

# step WHAT COMMAND...: run a command without its output. If it fails, the common causes get one
# line; of other failures, the errors that the command printed are shown too.
step() {
    what=$1
    shift
    output=$("$@" 2>&1) && return # kept in memory: the disk may be full
    rm -f "$unfinished"
    if printed 'No space left|Errno 28|Disk quota exceeded|Errno 122'; then
        fail "the disk is full ($what): the environment needs 7 GB in $venv, and its downloads as \
much in pip's cache and ${TMPDIR:-/tmp}; free some space and run make again."
    elif printed 'from versions: none|Max retries|NewConnection|Timeout|name resolution|unreachable'; then
        fail "the package index cannot be reached ($what): check the network, or set PIP_INDEX_URL \
to a mirror, and run make again."
    fi
    printf '%s\n' "$output" | grep -v -i -E '^(WARNING|DEPRECATION|\[notice\])' >&2
    fail "$what: the command failed as shown above; fix that and run make again."
}

# install WHAT PIP-ARGUMENT...
install() {
    what=$1
    shift
    echo "  $what"
    step "installing $what" "$venv/bin/python" -m pip --disable-pip-version-check install \
        --quiet --quiet --no-input "$@"
}

# Sets python and found, the version of it.
find_python() {
    second_best= # the first that is supported but has no venv module
    for python in ${chosen:-python3.13 python3.12 python3.11 python3.10 python3}; do
        answer=$("$python" -c "$probe" 2>/dev/null) || continue # not there, or a shim that fails
        # shellcheck disable=SC2086
        set -- $answer
        found=$1
        case $2 in
        ok) return ;;
        no-venv) second_best=${second_best:-$python $1} ;;
        unsupported) [ -z "$chosen" ] ||
            fail "$chosen is Python $1, and this project supports $3 to $4: pass another PYTHON." ;;
        esac
    done
    if [ -n "$second_best" ]; then
        version=${second_best#* }
        fail "${second_best% *} has no venv module: install it (on Debian and Ubuntu: apt install \
python$version-venv) or pass another one, as in make setup PYTHON=/usr/local/bin/python$version."
    fi
    [ -z "$chosen" ] || fail "$chosen does not run: pass PYTHON=FILE of a working Python."
    fail "no supported Python runs here (looked for python3.13 to python3.10, and python3): install \
one, or pass it, as in make setup PYTHON=/opt/python3.12/bin/python3.12."
}

# What is there is kept if it works: it may have cost a long download.
version=
if [ ! -e "$unfinished" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    # shellcheck disable=SC2046
    set -- $("$venv/bin/python" -c "$probe")
    [ "$2" = unsupported ] || version=$1
fi
if [ -z "$version" ] || [ -n "$chosen" ]; then
    find_python
    if [ -n "$version" ] && [ "$version" != "$found" ]; then
        fail "$venv has Python $version, not $found: run make clean first to replace it."
    fi
fi
if [ -z "$version" ]; then
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
        fail "$venv exists and is not a virtual environment: move it out of the way."
    fi
    echo "setting up $venv with Python $found (a download of several GB the first time)"
    step "creating $venv" "$python" -m venv --clear "$venv"
else
    echo "updating $venv with Python $version"
fi

# Detectron2 comes last, by hash, into the environment's own folder: see docs/installation.md. torch
# comes first because packages that build against it need it. The peers that the tests compare with
# are installed without their dependencies, which would replace ours.
touch "$unfinished" || fail "$venv cannot be written: check its permissions and the disk."
pinned="--constraint requirements/constraints.txt"
extras=opencv,detectron2-deps,safetensors,shards,slurm,export,fast-eval,docs,dev
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
# shellcheck disable=SC2086
{
    install setuptools $pinned setuptools wheel
    install "torch and torchvision" $pinned torch torchvision
    install "moco-det" $pinned --no-build-isolation --editable ".[$extras]"
    install "Detectron2" --no-deps --require-hashes --target "$site" --upgrade \
        --python-version 3.10 --only-binary=:all: -r requirements/detectron2.txt
    install "the tests' peers" --no-deps $pinned \
        timm lightly lvis cityscapesscripts pyquaternion shapely
}
step "importing the packages" "$venv/bin/python" -c \
    'import moco_det.modeling, pretrain.engine.train_loop'
rm -f "$unfinished"
