// SPDX-License-Identifier: Apache-2.0
// How work is spread over threads. The default is a pool of our own (parallel.cpp); hosts replace
// it through qk_set_parallel or per call.
#pragma once

#include <cstdint>

#include "qkern/qkern.h"

namespace qkern {

// Threads that a call with this choice (NULL: the process-wide one) may use, at least 1.
int parallel_threads(const qk_parallel* choice);

// Whether a caller's choice (NULL: none) can be used.
qk_status check_parallel(const qk_parallel* choice);

// Runs fn(arg, t) for t in [0, tasks); serial where one thread or one task is left.
void parallel_run(const qk_parallel* choice, int64_t tasks, qk_task fn, void* arg);

// The same for a callable. It must not throw.
template <class Body>
void parallel_for(const qk_parallel* choice, int64_t tasks, const Body& body) {
  parallel_run(
      choice, tasks, [](void* arg, int64_t task) { (*static_cast<const Body*>(arg))(task); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace qkern
