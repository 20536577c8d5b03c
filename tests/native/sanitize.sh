#!/bin/sh
# Builds the core and the native tests with sanitizers and runs them; any report is a failure.
# ThreadSanitizer watches the calls, settings and repeats; it does not follow threads that a child
# makes after fork, so that fork is left to the other build.
set -eu
cd "$(dirname "$0")/../.."

build() {
  cmake -S tests/native -B "$1" -DQKERN_SANITIZE="$2" ${CCACHE:+-DCMAKE_CXX_COMPILER_LAUNCHER=$CCACHE}
  cmake --build "$1" --parallel 2 --target sweep --target stress
}

build build/sanitize address,undefined
# Faults on guard pages are the sweep's own to report; stacks of leaks need frame pointers only.
ASAN_OPTIONS=handle_segv=0:detect_leaks=1:detect_stack_use_after_return=1 \
  build/sanitize/sweep --cases "${CASES:-16}"
ASAN_OPTIONS=detect_leaks=1 build/sanitize/stress --light

build build/tsan thread
for part in threads settings repeats; do
  TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 build/tsan/stress --light --only $part
done
echo "no sanitizer has anything to report"
