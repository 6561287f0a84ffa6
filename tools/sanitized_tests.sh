#!/usr/bin/env bash
# Builds the extensions with the sanitizers in a copy of the tree ($1, with a .venv-test), and runs the model tests on them.
set -euo pipefail
tree=$1
cd "$tree"
. .venv-test/bin/activate
pip install -q "Cython>=3.1,<4" "setuptools>=77"
ONIONSKIN_SANITIZE=address,undefined python setup.py -q build_ext --inplace --force >/dev/null
# Python itself is not built with the sanitizer, so its run time is loaded first; Python's own leaks are not ours.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:allow_user_segv_handler=1:handle_sigbus=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export ONIONSKIN_EXAMPLES_PERCENT=50 ONIONSKIN_OPERATIONS=1000
# A directory of its own: pytest tidies up among those of other runs else, and what it meets there would fail this one.
PYTHONPATH=src python -m pytest -q -p no:cacheprovider --basetemp "$tree/sanitized" \
  tests/model tests/unit/kernels/test_volume_faults.py
