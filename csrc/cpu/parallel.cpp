// SPDX-License-Identifier: Apache-2.0
// A small thread pool, and the switch between it, a host's own scheme, and an OpenMP runtime that
// the host already has.
//
// The pool: workers spin for a short while after each call (a decode step makes hundreds of calls
// a few microseconds apart) and then sleep on a condition variable. One call owns the pool at a
// time; a second caller that finds it taken runs its own tasks serially, so that N callers never
// make more than N + pool threads busy. Tasks are claimed from an atomic counter.
//
// Fork: a child has none of its parent's threads. It starts with a fresh pool, and never enters
// the parent's OpenMP runtime again (libgomp would wait for threads that do not exist).

#include "parallel.h"

#if defined(__linux__)
#include <sched.h>
#endif
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "error.h"
#include "structs.h"

namespace qkern {
namespace {

constexpr auto kSpin = std::chrono::microseconds(30);
constexpr int kMostThreads = 1024;

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Tasks {
  qk_task fn;
  void* arg;
  int64_t count;
  std::atomic<int64_t> next{0};

  Tasks(qk_task fn, void* arg, int64_t count) : fn(fn), arg(arg), count(count) {}
  void work() {
    for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < count;) fn(arg, t);
  }
};

class Pool {
 public:
  // True when it ran the tasks; false when another call owns the pool.
  bool run(int threads, int64_t count, qk_task fn, void* arg) {
    if (!owner_.try_lock()) return false;
    std::lock_guard<std::mutex> own(owner_, std::adopt_lock);
    if (threads > kMostThreads) threads = kMostThreads;
    grow(threads - 1);
    const int helpers = started_ < threads - 1 ? started_ : threads - 1;
    Tasks tasks(fn, arg, count);
    current_.store(&tasks, std::memory_order_relaxed);
    pending_.store(helpers, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      const uint64_t count_of_calls = (call_.load(std::memory_order_relaxed) >> 16) + 1;
      call_.store(count_of_calls << 16 | (uint64_t)helpers, std::memory_order_release);
    }
    wake_.notify_all();
    tasks.work();
    for (int spins = 0; pending_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < 2000)
        cpu_relax();
      else
        std::this_thread::yield();
    }
    return true;
  }

 private:
  void grow(int helpers) {
    while (started_ < helpers) {
      const int id = started_;
      const uint64_t seen = call_.load(std::memory_order_relaxed);
      try {
        std::thread(&Pool::serve, this, id, seen).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: the call runs on those there are
      }
      ++started_;
    }
  }

  void serve(int id, uint64_t seen) {
    for (;;) {
      const auto deadline = std::chrono::steady_clock::now() + kSpin;
      while (call_.load(std::memory_order_acquire) == seen &&
             std::chrono::steady_clock::now() < deadline)
        cpu_relax();
      if (call_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        wake_.wait(lock, [&] { return call_.load(std::memory_order_acquire) != seen; });
      }
      // One word tells both which call this is and how many helpers it wants: a helper that is
      // wanted cannot miss its call (the call waits for it), one that is not may skip several.
      seen = call_.load(std::memory_order_acquire);
      if (id >= (int)(seen & 0xffff)) continue;
      current_.load(std::memory_order_relaxed)->work();
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex owner_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> call_{0};  // number of the call << 16 | helpers it wants
  std::atomic<Tasks*> current_{nullptr};
  std::atomic<int> pending_{0};
  int started_ = 0;
};

int available_processors() {
#if defined(__linux__)
  cpu_set_t set;
  int count = sched_getaffinity(0, sizeof set, &set) == 0
                  ? CPU_COUNT(&set)
                  : (int)std::thread::hardware_concurrency();
  // A container's share (cgroup v2 "quota period" in microseconds) is a limit too.
  if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "re")) {
    long long quota = 0, period = 0;
    if (std::fscanf(file, "%lld %lld", &quota, &period) == 2 && quota > 0 && period > 0) {
      const int share = (int)((quota + period - 1) / period);
      if (share < count) count = share;
    }
    std::fclose(file);
  }
#else
  int count = (int)std::thread::hardware_concurrency();
#endif
  return count > 0 ? count : 1;
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpMaxThreads = int (*)();

// The pool lives for ever: its threads may outlast static destruction.
std::atomic<Pool*> pool{nullptr};
std::atomic<int32_t> thread_limit{0};
std::atomic<bool> in_child{false};
std::atomic<const qk_parallel*> host{nullptr};  // a Choice, &openmp_choice or null
std::atomic<GompParallel> gomp_parallel{nullptr};
std::atomic<OmpMaxThreads> omp_max_threads{nullptr};

Pool* the_pool() {
  Pool* p = pool.load(std::memory_order_acquire);
  if (p) return p;
  Pool* fresh = new (std::nothrow) Pool;
  if (!fresh) return nullptr;
  if (!pool.compare_exchange_strong(p, fresh)) {
    delete fresh;
    return p;
  }
  return fresh;
}

void after_fork_in_child() {
  in_child.store(true);
  pool.store(nullptr);  // the parent's object stays as it is; its threads are not here
}

struct ForkHandler {
  ForkHandler() { pthread_atfork(nullptr, nullptr, after_fork_in_child); }
} fork_handler;

// Every choice a host ever made, kept for ever: a call on another thread may still be running on
// one that has been replaced. Without a lock, which a forked child could find taken.
struct Choice {
  qk_parallel parallel;
  const Choice* next;
};
std::atomic<const Choice*> choices{nullptr};

const qk_parallel* remember(const qk_parallel& p) {
  const Choice* first = choices.load(std::memory_order_acquire);
  for (const Choice* c = first; c; c = c->next)
    if (c->parallel.threads == p.threads && c->parallel.run == p.run &&
        c->parallel.context == p.context)
      return &c->parallel;
  Choice* fresh = new (std::nothrow) Choice{p, first};
  if (!fresh) return nullptr;
  while (!choices.compare_exchange_weak(fresh->next, fresh, std::memory_order_release,
                                        std::memory_order_acquire)) {
  }
  return &fresh->parallel;
}

int32_t openmp_threads(void*) { return omp_max_threads.load()(); }

void openmp_run(void*, int64_t count, qk_task fn, void* arg) {
  Tasks tasks(fn, arg, count);
  const int threads = parallel_threads(nullptr);
  gomp_parallel.load()([](void* t) { static_cast<Tasks*>(t)->work(); }, &tasks,
                       (unsigned)(count < threads ? count : threads), 0);
}

const qk_parallel openmp_choice = {sizeof(qk_parallel), openmp_threads, openmp_run, nullptr};

const qk_parallel* chosen(const qk_parallel* choice) {
  return choice ? choice : host.load(std::memory_order_acquire);
}

// What runs the tasks. A forked child still asks the OpenMP runtime how many threads it may use
// (parallel_threads), which is safe, but does not enter it.
const qk_parallel* effective(const qk_parallel* choice) {
  const qk_parallel* c = chosen(choice);
  return c == &openmp_choice && in_child.load(std::memory_order_relaxed) ? nullptr : c;
}

}  // namespace

int parallel_threads(const qk_parallel* choice) {
  static const int processors = available_processors();
  const qk_parallel* c = chosen(choice);
  int threads = c ? c->threads(c->context) : processors;
  const int limit = thread_limit.load(std::memory_order_relaxed);
  if (limit > 0 && threads > limit) threads = limit;
  return threads > 1 ? threads : 1;
}

void parallel_run(const qk_parallel* choice, int64_t tasks, qk_task fn, void* arg) {
  const int threads = parallel_threads(choice);
  if (threads > 1 && tasks > 1) {
    if (const qk_parallel* c = effective(choice)) {
      c->run(c->context, tasks, fn, arg);
      return;
    }
    Pool* p = the_pool();
    if (p && p->run(threads < tasks ? threads : (int)tasks, tasks, fn, arg)) return;
  }
  for (int64_t t = 0; t < tasks; ++t) fn(arg, t);
}

qk_status check_parallel(const qk_parallel* choice) {
  if (!choice) return QK_OK;
  if (qk_status s = check_struct("qk_parallel", choice)) return s;
  if (!choice->threads || !choice->run)
    return fail(QK_INVALID_ARGUMENT, "qk_parallel: threads and run must be set");
  return QK_OK;
}

}  // namespace qkern

using namespace qkern;

extern "C" {

qk_status qk_set_parallel(const qk_parallel* parallel) {
  if (qk_status s = check_parallel(parallel)) return s;
  const qk_parallel* choice = parallel ? remember(*parallel) : nullptr;
  if (parallel && !choice)
    return fail(QK_OUT_OF_MEMORY, "qk_set_parallel: no memory for the choice");
  host.store(choice, std::memory_order_release);
  return QK_OK;
}

qk_status qk_set_parallel_openmp(void* parallel, void* max_threads) {
  if (!parallel || !max_threads)
    return fail(QK_INVALID_ARGUMENT,
                "qk_set_parallel_openmp: both GOMP_parallel and omp_get_max_threads are needed");
  gomp_parallel.store(reinterpret_cast<GompParallel>(parallel));
  omp_max_threads.store(reinterpret_cast<OmpMaxThreads>(max_threads));
  host.store(&openmp_choice, std::memory_order_release);
  return QK_OK;
}

qk_status qk_set_threads(int32_t threads) {
  if (threads < 0)
    return fail(QK_INVALID_ARGUMENT, "qk_set_threads: expected 0 (no limit) or more, got %d",
                threads);
  thread_limit.store(threads);
  return QK_OK;
}

int32_t qk_get_threads(void) { return parallel_threads(nullptr); }
}
