#!/bin/sh
# The sweep on processors that this machine is not: qemu-x86_64 with models that lack AVX-512,
# AVX2, AVX. Dispatch must pick the level expected, no instruction may be illegal, and the scalar
# results must have the digest they have here. With a Python as argument, a part of the Python
# tests runs too.
#
# Two faults of QEMU 7.2 are stepped around, both right on every processor: its vmaskmovps reads
# lanes that are masked out (--slack 64), and its vgatherdps before vcvtps2ph gives other values
# (dequantize_any_avx2 is left out; the same object runs natively in the full sweep).
set -eu
cd "$(dirname "$0")/../.."
cases=${CASES:-4}
if ! command -v qemu-x86_64 >/dev/null; then
  echo "test-isa needs qemu-x86_64: install the Debian package qemu-user" >&2
  exit 1
fi
scalar() { awk '/_scalar |^pack|^codes|^fit/ { print $1, $NF }'; }

build/native/sweep --cases "$cases" | scalar > build/native/here.txt
for pair in Haswell:avx2 SandyBridge:scalar Nehalem:scalar; do
  model=${pair%:*} level=${pair#*:}
  log=build/native/$model.txt
  qemu-x86_64 -cpu "$model" build/native/sweep --cases "$cases" --slack 64 \
    --skip dequantize_any_avx2 > "$log" 2>"$log.err" || { cat "$log" "$log.err"; exit 1; }
  grep -q "detected $level," "$log" || { echo "$model: not $level"; head -1 "$log"; exit 1; }
  scalar < "$log" | cmp - build/native/here.txt || { echo "$model: other scalar results"; exit 1; }
  echo "$model: $level, $(awk '$1 == "total" { print $2 }' "$log") cases, ok"
done

python=${1:-}
[ -n "$python" ] || exit 0
# numpy is built for processors with SSE4.2 (x86-64-v2) at least, which Nehalem has.
for model in Haswell Nehalem; do
  qemu-x86_64 -cpu "$model" "$python" -m pytest -q -p no:cacheprovider tests/test_codes.py \
    tests/test_linear.py -k "codes or contract and (w4a8d_avx2 or w4a32_avx2 or any_a32)"
  echo "$model: Python tests ok"
done
