#!/usr/bin/env bash
# Builds and runs each tests/fuzz/fuzz_*.c over its corpus. $1: seconds for each; $2: a directory for programs and finds.
# New inputs stay in that directory: what is worth keeping is copied to the corpus by hand.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
out=${2:-build/fuzz}
mkdir -p "$out"
out=$(realpath "$out")
kernels=$(ls csrc/*/*.c | grep -v '/preload\.c$') # that library is for another program
for source in tests/fuzz/fuzz_*.c; do
  name=$(basename "$source" .c)
  # shellcheck disable=SC2086
  clang -std=gnu11 -g -O1 -fsanitize=fuzzer,address,undefined -pthread -Icsrc -o "$out/$name" "$source" $kernels
  mkdir -p "$out/new_$name"
  echo "-- $name, for $seconds s"
  "$out/$name" -max_total_time="$seconds" -print_final_stats=1 -artifact_prefix="$out/" "$out/new_$name" "tests/fuzz/corpus/${name#fuzz_}"
done
