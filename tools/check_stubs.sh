#!/usr/bin/env bash
# Compares the stub of every extension module with the module that is installed. $STUBTEST: where it is, if not on the PATH.
# Runs outside of the tree, whose src/ has stubs but no modules.
set -euo pipefail
cd "$(dirname "$0")/.."
tree=$PWD
modules=$(cd src && printf '%s\n' onionskin/*/_*.pyx | sed 's/\.pyx$//; s#/#.#g')
cd /
# shellcheck disable=SC2086
"${STUBTEST:-stubtest}" --concise --ignore-disjoint-bases --allowlist "$tree/tools/stubtest_allowlist.txt" $modules
