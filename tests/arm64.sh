#!/bin/sh
# The kernels' tests on an emulated AArch64 processor, on a Debian or Ubuntu machine of any kind.
#
#   tests/arm64.sh                                   # all of them, for neon_i8mm and neon_dot
#   TARGETS=plain tests/arm64.sh tests/machine/test_matmul.py
#
# Needs qemu-aarch64-static (apt-get install qemu-user-static) and a Python with pip. All else is
# unpacked into .arm64, and nothing is installed: an arm64 Python of this system's release with the
# libraries that it needs, and arm64 wheels of what the tests import. CPU chooses the emulated
# processor: cortex-a76 has no SMMLA, cortex-a57 no SDOT either.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
TARGETS=${TARGETS:-neon_i8mm neon_dot}
KERNEL_TESTS="math packing matmul rows linear lora attention loop clocked_loop machine probe"
FOLDER=$PWD/.arm64
ROOT=$FOLDER/root

command -v qemu-aarch64-static > /dev/null || {
    echo "qemu-aarch64-static is missing: apt-get install qemu-user-static" >&2
    exit 1
}

arm64() {
    qemu-aarch64-static -cpu "${CPU:-max}" -L "$ROOT" "$ROOT/usr/bin/python3" "$@"
}

# A package database of its own: the system's is neither read nor changed.
arm64_apt() {
    apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 \
        -o Dir::State="$FOLDER/state" -o Dir::State::status="$FOLDER/status" \
        -o Dir::Cache="$FOLDER/cache" -o Debug::NoLocking=true "$@"
}

if [ ! -e "$FOLDER/.ready" ]; then
    echo "unpacking an arm64 Python and its wheels into .arm64"
    rm -rf "$FOLDER"
    mkdir -p "$ROOT" "$FOLDER/state/lists/partial" "$FOLDER/cache/archives/partial"
    : > "$FOLDER/status"
    arm64_apt update
    arm64_apt install --download-only --no-install-recommends -y python3 libstdc++6
    for package in "$FOLDER"/cache/archives/*.deb; do
        dpkg-deb -x "$package" "$ROOT"
    done
    "$PYTHON" - > "$FOLDER/needs" <<'END'
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
tests = project["optional-dependencies"]["test"]
print(*project["dependencies"], sep="\n")
others = ("cyclewise", "httpx", "mypy", "openai", "perfetto", "ruff")  # no kernel needs them
print(*(need for need in tests if not need.startswith(others)), sep="\n")
END
    version=$(arm64 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$PYTHON" -m pip -q install --target "$FOLDER/site" --requirement "$FOLDER/needs" \
        --only-binary=:all: --python-version "$version" --implementation cp \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
        --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64
    touch "$FOLDER/.ready"
fi

export PYTHONPATH="$PWD:$FOLDER/site" PYTHONDONTWRITEBYTECODE=1 CYCLEWISE_CACHE="$FOLDER/kernels"
[ $# -gt 0 ] || set -- $(printf 'tests/machine/test_%s.py ' $KERNEL_TESTS)
for target in $TARGETS; do
    echo "$target:"
    CYCLEWISE_TARGET=$target arm64 -m pytest -q -p no:cacheprovider "$@"
done
