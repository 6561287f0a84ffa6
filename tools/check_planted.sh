#!/usr/bin/env bash
# Each check of directions fails for one planted violation: a check that cannot fail says nothing.
# LINT_IMPORTS is the program (default: the one on the PATH).
set -euo pipefail
cd "$(dirname "$0")/.."
lint_imports=${LINT_IMPORTS:-lint-imports}
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT

fresh() {
  rm -rf "$tree"/*
  cp -r src csrc .importlinter "$tree"
}

expect_red() { # what was planted, and the command that must fail
  if (cd "$tree" && "${@:2}" >/dev/null 2>&1); then
    echo "not found: $1"
    exit 1
  fi
}

python_is_red() { expect_red "$1" env PYTHONPATH="$tree/src" "$lint_imports" --no-cache; }
c_is_red() { expect_red "$1" python3 "$here/tools/check_layers.py" "$tree"; }
here=$PWD

fresh
(cd "$tree" && PYTHONPATH="$tree/src" "$lint_imports" --no-cache >/dev/null)
python3 tools/check_layers.py "$tree"

echo "import onionskin.operations.fold" >>"$tree/src/onionskin/base/sizes.py"
python_is_red "an import from a lower room"
fresh
printf 'from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onionskin.operations.fold\n' >>"$tree/src/onionskin/base/sizes.py"
python_is_red "an import of a type alone from a lower room"
fresh
echo "import sqlite3" >>"$tree/src/onionskin/operations/fold.py"
python_is_red "SQLite outside the catalog"
fresh
sed -i '1a #include "volume/volume.h"' "$tree/csrc/base/crc32c.c"
c_is_red "an include from a lower room of csrc"
fresh
sed -i '1a #include "volume/internal.h"' "$tree/csrc/nbd/server.c"
c_is_red "an include behind the contract of the volume"
fresh
printf '\nvoid onion_planted(void) { onion_volume_flush(0); }\n' >>"$tree/csrc/volume/lifecycle.c"
sed -i '0,/^int onion_volume_flush(/s//void onion_planted(void);\nint onion_volume_flush(/; 0,/^int onion_volume_flush(.*{$/s//&\n    onion_planted();/' "$tree/csrc/volume/flush.c"
c_is_red "two files of csrc that call each other"
fresh
sed -i '1a from onionskin.storage cimport chain' "$tree/src/onionskin/kernels/_wipe.pyx"
c_is_red "an extension module that imports what is above it"
