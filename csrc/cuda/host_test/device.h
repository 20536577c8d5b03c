// SPDX-License-Identifier: Apache-2.0
// A CUDA device for tests without one: the kernels' own source is compiled for the host and every
// thread of a block is a coroutine. Threads run in an arbitrary (seeded) order and change places at
// barriers and warp-wide instructions only; cp.async moves its bytes at the latest moment that the
// rules allow, i.e. in wait_group; shared memory starts as NaN. The matrix instructions follow the
// fragment tables of the PTX manual. Include this before any kernel header.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define __global__ inline
#define __device__ inline
#define __forceinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static
#define QKERN_DYNAMIC_SHARED(name) \
  uint8_t* const name = ::emulator::block().shared.data() + ::emulator::block().shared_start

namespace emulator {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

struct Copy {
  uint32_t to;
  const void* from;
  int valid;
};

struct Thread {
  ucontext_t context;  // of the first start; later changes of place cost no system call
  jmp_buf place;
  bool started = false;
  std::unique_ptr<uint8_t[]> stack;
  bool done = false, waiting = false;
  void* operands = nullptr;
  std::vector<std::vector<Copy>> groups{1};  // the last one is not committed yet
};

struct Warp {
  int arrived = 0;
  const char* what = nullptr;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  size_t shared_start = 0, shared_bytes = 0;
  jmp_buf scheduler_place;
  int current = -1, at_barrier = 0;
  Dim index, grid, size;
  std::function<void()> body;
  uint32_t seed = 1;
};

inline Block& block() {
  static Block b;
  return b;
}

[[noreturn]] inline void die(const char* what) {
  fprintf(stderr, "emulated device: %s (block %u,%u thread %d)\n", what, block().index.x,
          block().index.y, block().current);
  abort();
}

inline void pause() {
  Block& b = block();
  Thread& self = b.threads[(size_t)b.current];
  if (_setjmp(self.place) == 0) _longjmp(b.scheduler_place, 1);
}

inline void resume(Thread& t) {
  Block& b = block();
  if (_setjmp(b.scheduler_place)) return;
  if (t.started) _longjmp(t.place, 1);
  t.started = true;
  setcontext(&t.context);
}

inline void entry() {
  Block& b = block();
  b.body();
  b.threads[(size_t)b.current].done = true;
  pause();
}

// A warp-wide instruction: the last lane to arrive runs `all` on the 32 lanes' operands.
template <class T>
void warp_wide(const char* what, T* operands, void (*all)(T* const* lanes)) {
  Block& b = block();
  Warp& warp = b.warps[(size_t)b.current / 32];
  if (warp.arrived > 0 && strcmp(warp.what, what) != 0) die("lanes of a warp diverge");
  warp.what = what;
  Thread& self = b.threads[(size_t)b.current];
  self.operands = operands;
  if (++warp.arrived < 32) {
    self.waiting = true;
    while (self.waiting) pause();
    return;
  }
  T* lanes[32];
  for (int l = 0; l < 32; ++l) lanes[l] = (T*)b.threads[(size_t)(b.current / 32 * 32 + l)].operands;
  all(lanes);
  warp.arrived = 0;
  for (int l = 0; l < 32; ++l) b.threads[(size_t)(b.current / 32 * 32 + l)].waiting = false;
}

inline void barrier() {
  Block& b = block();
  Thread& self = b.threads[(size_t)b.current];
  if (++b.at_barrier < (int)b.threads.size()) {
    self.waiting = true;
    while (self.waiting) pause();
    return;
  }
  b.at_barrier = 0;
  for (Thread& t : b.threads) t.waiting = false;
}

// Runs body() once per thread of each block of the grid.
inline void launch(Dim grid, unsigned threads, size_t shared_bytes, std::function<void()> body) {
  Block& b = block();
  b.grid = grid;
  b.size = {threads, 1, 1};
  b.body = std::move(body);
  b.shared_bytes = shared_bytes;
  b.shared.resize(shared_bytes + 256);
  b.shared_start = (128 - (uintptr_t)b.shared.data() % 128) % 128;
  constexpr size_t kStack = 128 * 1024;
  if (b.threads.size() != threads) {
    b.threads = std::vector<Thread>(threads);
    for (Thread& t : b.threads) t.stack.reset(new uint8_t[kStack]);
  }
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      b.index = {x, y, 0};
      b.at_barrier = 0;
      b.warps.assign((threads + 31) / 32, Warp{});
      memset(b.shared.data(), 0xff, b.shared.size());
      for (Thread& t : b.threads) {
        t.done = t.waiting = t.started = false;
        t.groups.assign(1, {});
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = t.stack.get();
        t.context.uc_stack.ss_size = kStack;
        t.context.uc_link = nullptr;
        makecontext(&t.context, (void (*)())entry, 0);
      }
      for (unsigned left = threads; left > 0;) {
        b.seed = b.seed * 1664525u + 1013904223u;
        const unsigned start = (b.seed >> 8) % threads;
        unsigned ran = 0;
        for (unsigned i = 0; i < threads; ++i) {
          const unsigned at = (start + i) % threads;
          Thread& t = b.threads[at];
          if (t.done || t.waiting) continue;
          b.current = (int)at;
          ++ran;
          resume(t);
          if (t.done) --left;
        }
        if (ran == 0 && left > 0) die("threads wait for each other");
      }
      for (size_t i = shared_bytes; i < b.shared.size() - b.shared_start; ++i)
        if (b.shared[b.shared_start + i] != 0xff) die("shared memory written past its end");
    }
}

struct ThreadIndex {
  struct X {
    operator unsigned() const { return (unsigned)block().current; }
  } x;
};

}  // namespace emulator

static const emulator::ThreadIndex threadIdx;
#define blockIdx (::emulator::block().index)
#define gridDim (::emulator::block().grid)
#define blockDim (::emulator::block().size)

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp() {
  int none = 0;
  emulator::warp_wide<int>("syncwarp", &none, [](int* const*) {});
}
inline uint32_t __shfl_xor_sync(uint32_t, uint32_t value, int mask) {
  struct Operands {
    uint32_t value, result;
    int mask;
  } o = {value, 0, mask};
  emulator::warp_wide<Operands>("shfl", &o, [](Operands* const* lanes) {
    for (int l = 0; l < 32; ++l) lanes[l]->result = lanes[l ^ lanes[l]->mask]->value;
  });
  return o.result;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline uint32_t __float_as_uint(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
inline float __uint_as_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline float __fadd_rn(float a, float b) { return a + b; }

#include "../bits.cuh"

namespace qkern {
namespace cuda {

inline uint32_t shared_address(const void* pointer) {
  const emulator::Block& b = emulator::block();
  const int64_t at = (const uint8_t*)pointer - (b.shared.data() + b.shared_start);
  if (at < 0 || at > (int64_t)b.shared_bytes) emulator::die("not an address of shared memory");
  return (uint32_t)at;
}

// PTX manual, matrix fragments for mma.m16n8k16 (16-bit) and .m16n8k32 (8-bit): element e of the A,
// B and C fragments of a lane.
struct Fragment16 {
  static int a_row(int lane, int e) { return lane / 4 + (e % 4 < 2 ? 0 : 8); }
  static int a_column(int lane, int e) { return lane % 4 * 2 + e % 2 + (e < 4 ? 0 : 8); }
  static int b_row(int lane, int e) { return lane % 4 * 2 + e % 2 + (e < 2 ? 0 : 8); }
  static int b_column(int lane, int) { return lane / 4; }
};
struct Fragment8 {
  static int a_row(int lane, int e) { return lane / 4 + (e / 4 % 2 == 0 ? 0 : 8); }
  static int a_column(int lane, int e) { return lane % 4 * 4 + e % 4 + (e < 8 ? 0 : 16); }
  static int b_row(int lane, int e) { return lane % 4 * 4 + e % 4 + (e < 4 ? 0 : 16); }
  static int b_column(int lane, int) { return lane / 4; }
};
inline int c_row(int lane, int e) { return lane / 4 + (e < 2 ? 0 : 8); }
inline int c_column(int lane, int e) { return lane % 4 * 2 + e % 2; }

template <class D>
struct MmaOperands {
  D* d;
  const uint32_t *a, *b;
};

template <class T>
void mma(T, float* d, const uint32_t* a, const uint32_t* b) {
  MmaOperands<float> o = {d, a, b};
  emulator::warp_wide<MmaOperands<float>>("mma", &o, [](MmaOperands<float>* const* lanes) {
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l) {
      for (int e = 0; e < 8; ++e)
        a[Fragment16::a_row(l, e)][Fragment16::a_column(l, e)] =
            T::to_float((uint16_t)(lanes[l]->a[e / 2] >> (16 * (e % 2))));
      for (int e = 0; e < 4; ++e)
        b[Fragment16::b_row(l, e)][Fragment16::b_column(l, e)] =
            T::to_float((uint16_t)(lanes[l]->b[e / 2] >> (16 * (e % 2))));
    }
    for (int l = 0; l < 32; ++l)
      for (int e = 0; e < 4; ++e) {
        float sum = lanes[l]->d[e];
        for (int k = 0; k < 16; ++k) sum += a[c_row(l, e)][k] * b[k][c_column(l, e)];
        lanes[l]->d[e] = sum;
      }
  });
}
inline void mma(S8, int32_t* d, const uint32_t* a, const uint32_t* b) {
  MmaOperands<int32_t> o = {d, a, b};
  emulator::warp_wide<MmaOperands<int32_t>>("mma s8", &o, [](MmaOperands<int32_t>* const* lanes) {
    int32_t a[16][32], b[32][8];
    for (int l = 0; l < 32; ++l) {
      for (int e = 0; e < 16; ++e)
        a[Fragment8::a_row(l, e)][Fragment8::a_column(l, e)] =
            (int8_t)(lanes[l]->a[e / 4] >> (8 * (e % 4)));
      for (int e = 0; e < 8; ++e)
        b[Fragment8::b_row(l, e)][Fragment8::b_column(l, e)] =
            (int8_t)(lanes[l]->b[e / 4] >> (8 * (e % 4)));
    }
    for (int l = 0; l < 32; ++l)
      for (int e = 0; e < 4; ++e)
        for (int k = 0; k < 32; ++k) lanes[l]->d[e] += a[c_row(l, e)][k] * b[k][c_column(l, e)];
  });
}

struct LdmatrixOperands {
  uint32_t* d;
  uint32_t address;
};
template <int kMatrices>
void ldmatrix(uint32_t* d, uint32_t address) {
  LdmatrixOperands o = {d, address};
  emulator::warp_wide<LdmatrixOperands>(
      kMatrices == 2 ? "ldmatrix x2" : "ldmatrix x4", &o, [](LdmatrixOperands* const* lanes) {
        const emulator::Block& b = emulator::block();
        for (int m = 0; m < kMatrices; ++m)
          for (int l = 0; l < 32; ++l) {
            const uint32_t row = lanes[8 * m + l / 4]->address;
            if (row % 16 || row + 16 > b.shared_bytes) emulator::die("bad address of ldmatrix");
            memcpy(lanes[l]->d + m, b.shared.data() + b.shared_start + row + l % 4 * 4, 4);
          }
      });
}
inline void ldmatrix_x4_transposed(uint32_t* d, uint32_t address) {
  LdmatrixOperands o = {d, address};
  emulator::warp_wide<LdmatrixOperands>(
      "ldmatrix x4 trans", &o, [](LdmatrixOperands* const* lanes) {
        const emulator::Block& b = emulator::block();
        for (int m = 0; m < 4; ++m)
          for (int l = 0; l < 32; ++l)
            for (int e = 0; e < 2; ++e) {
              const uint32_t row = lanes[8 * m + l % 4 * 2 + e]->address;
              if (row % 16 || row + 16 > b.shared_bytes) emulator::die("bad address of ldmatrix");
              memcpy((uint8_t*)(lanes[l]->d + m) + 2 * e,
                     b.shared.data() + b.shared_start + row + l / 4 * 2, 2);
            }
      });
}
inline void ldmatrix_x2(uint32_t* d, uint32_t address) { ldmatrix<2>(d, address); }
inline void ldmatrix_x4(uint32_t* d, uint32_t address) { ldmatrix<4>(d, address); }

inline void copy_async(uint32_t to, const void* from, bool valid) {
  emulator::Block& b = emulator::block();
  if (to % 16 || to + 16 > b.shared_bytes) emulator::die("cp.async to a bad address");
  if ((uintptr_t)from % 16) emulator::die("cp.async from a bad address");
  memset(b.shared.data() + b.shared_start + to, 0xff, 16);  // being written: worthless to readers
  b.threads[(size_t)b.current].groups.back().push_back({to, from, valid ? 16 : 0});
}
inline void commit_copies() {
  emulator::Block& b = emulator::block();
  b.threads[(size_t)b.current].groups.emplace_back();
}
template <int kPending>
void wait_copies() {
  emulator::Block& b = emulator::block();
  auto& groups = b.threads[(size_t)b.current].groups;
  while ((int)groups.size() - 1 > kPending) {
    for (const emulator::Copy& c : groups.front()) {
      uint8_t* to = b.shared.data() + b.shared_start + c.to;
      memset(to, 0, 16);
      memcpy(to, c.from, (size_t)c.valid);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace cuda
}  // namespace qkern
