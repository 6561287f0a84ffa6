#!/usr/bin/env bash
# Builds and runs each tests/kernels/check_*.c with the sanitizers. $1: a directory for the programs; $2: the sanitizers,
# where not address,undefined (thread is worth a run after changes to locks), or none. CC names another compiler than
# gcc, and RUNNER what starts programs that it makes for another processor.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/check}
sanitizers=${2:-address,undefined}
mkdir -p "$out"
compile="${CC:-gcc} -std=gnu11 -g -O1 -Wall -Wextra -Werror -pthread -Icsrc"
[ "$sanitizers" = none ] || compile+=" -fsanitize=$sanitizers -fno-sanitize-recover=all"
# The preload library is for another program: it would take the place of this one's mmap.
kernels=$(cd csrc && ls -- */*.c | grep -v '^machine/preload\.c$' | sed 's/\.c$//')
# shellcheck disable=SC2086
(cd "$out" && mkdir -p $(dirname $kernels | sort -u))
# Each kernel once for all programs, and as many at a time as there are processors.
# shellcheck disable=SC2086
printf '%s\n' $kernels | xargs -P "$(nproc)" -I KERNEL $compile -c -o "$out/KERNEL.o" csrc/KERNEL.c
# The fuzzers are run by hand; that they compile is looked at here.
for source in tests/fuzz/*.c; do
  ${CC:-gcc} -std=gnu11 -Wall -Wextra -Werror -Icsrc -fsyntax-only "$source"
done
for source in tests/kernels/check_*.c; do
  name=$(basename "$source" .c)
  # shellcheck disable=SC2086
  $compile -o "$out/$name" "$source" $(printf "$out/%s.o " $kernels)
  echo "-- $name"
  (cd "$out" && ${RUNNER:-} "./$name")
done
