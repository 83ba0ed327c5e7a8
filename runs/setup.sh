#!/usr/bin/env bash
# Make .venv with all packages that the runners and tests use, once; from then on this takes no time.
#   bash runs/setup.sh                              or sourced by a runner, which finds the interpreter in $PYTHON
# A stamp in .venv says what was installed: after a change of pyproject.toml the packages are installed again, and an
# environment that an interrupted set-up left is deleted first.
# SKIP_SETUP=1 takes an existing interpreter: $PYTHON, else the active environment, else a finished .venv, else python3.
source "$(dirname "${BASH_SOURCE[0]}")/_lib.sh"

VENV=.venv
STAMP=$VENV/.nanochat-setup
EXTRAS=dev  # matplotlib for the runners, the rest for the tests: one set for both

setup() {
    if [[ ${SKIP_SETUP:-0} == 1 ]]; then interpreter_at_hand; return; fi
    local wanted found='' other
    wanted="$ROOT [$EXTRAS] $(cksum < pyproject.toml)"
    [[ ! -f $STAMP ]] || found="$(cat "$STAMP")"
    if [[ $found != "$wanted" || ! -x $VENV/bin/python ]]; then
        case "$found" in
            '') ;;  # no .venv, or one that somebody else made: kept
            unfinished* | updating*)
                other="${found##* }"
                [[ $other == $$ ]] || ! kill -0 "$other" 2> /dev/null \
                    || die "process $other is setting up $VENV: wait for it. (If it is something else, remove $VENV.)"
                [[ $found == updating* ]] || rm -rf "$VENV" || die "cannot clear $VENV: wait for what is still writing there, then try again" ;;
            *) [[ -x $VENV/bin/python ]] || rm -rf "$VENV" ;;
        esac
        install
        printf '%s\n' "$wanted" > "$STAMP"
    fi
    PYTHON=$VENV/bin/python
}

interpreter_at_hand() {
    if [[ -z ${PYTHON-} ]]; then
        PYTHON=python3
        command -v python3 > /dev/null || PYTHON=python
        [[ -n ${VIRTUAL_ENV-}${CONDA_PREFIX-} || ! -f $STAMP || ! -x $VENV/bin/python ]] || PYTHON=$VENV/bin/python
    fi
    command -v "$PYTHON" > /dev/null \
        || die "SKIP_SETUP=1, but there is no interpreter '$PYTHON': set PYTHON to one that has torch"
}

# uv takes torch from PyTorch's own index, in the build that fits the GPU. Where that index cannot be reached pip does
# it, which also follows the machine's pip configuration.
install() {
    local started=$SECONDS python pip index=https://download.pytorch.org/whl/cpu reachable=1
    say "set-up: installing into $VENV, once (about as long as downloading torch takes)"
    [[ $(uname -s) != Linux ]] || can_reach "$index/torch/" || reachable=0
    if [[ $reachable == 1 ]] && command -v uv > /dev/null; then
        make_venv uv venv --quiet --allow-existing ${PYTHON:+"--python=$PYTHON"}
        run uv pip install --torch-backend=auto --python "$VENV/bin/python" -e ".[$EXTRAS]"
    else
        python="$(find_python)"
        make_venv "$python" -m venv
        "$VENV/bin/python" -m pip --version > /dev/null 2>&1 || run "$VENV/bin/python" -m ensurepip
        pip=("$VENV/bin/python" -m pip install --disable-pip-version-check)
        [[ -t 1 ]] || pip+=(--quiet)
        if [[ $(uname -s) == Linux ]] && ! has_gpu; then  # PyPI's torch is the CUDA build; 2.x+cpu outranks 2.x
            if [[ $reachable == 1 ]]; then
                pip+=(--extra-index-url "$index")
            else
                echo "note: $index is out of reach: pip takes the torch that its own sources have (PyPI's is gigabytes)"
            fi
        fi
        run "${pip[@]}" -e ".[$EXTRAS]"
    fi
    echo "set-up took $((SECONDS - started)) s"
}

# "$@ .venv" unless there is one already. The stamp says "unfinished", and by which process, until setup has finished.
make_venv() {
    local there=0
    [[ ! -x $VENV/bin/python ]] || there=1
    mkdir -p "$VENV"
    if [[ $there == 1 ]]; then echo "updating $$" > "$STAMP"; return; fi  # interrupted, it is updated again, not deleted
    echo "unfinished $$" > "$STAMP"
    run "$@" "$VENV"
}

find_python() {
    local candidate seen=''
    for candidate in ${PYTHON:-python3 python python3.13 python3.12 python3.11 python3.10 python3.14}; do
        command -v "$candidate" > /dev/null || continue
        seen="$seen $("$candidate" --version 2>&1 || true),"
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null || continue
        "$candidate" -c 'import venv, ensurepip' 2> /dev/null \
            || die "$candidate lacks the venv module that set-up needs. Debian/Ubuntu: sudo apt install python3-venv"
        echo "$candidate"
        return
    done
    die "set-up needs Python 3.10 or newer (found:${seen:- none,} no more). Debian/Ubuntu: sudo apt install python3 \
python3-venv; macOS: brew install python; or set PYTHON to the interpreter to use"
}

can_reach() {  # url, within 5 s, through the proxy if there is one
    local tool
    if command -v curl > /dev/null; then curl -sfI -m 5 -o /dev/null "$1"; return; fi
    for tool in python3 python; do
        if command -v "$tool" > /dev/null; then
            "$tool" -c "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)" "$1" 2> /dev/null
            return
        fi
    done
    return 1
}

setup
