// SPDX-License-Identifier: Apache-2.0
// What the host tests share: failures, counting, random numbers, exact buffers.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <memory>

extern int64_t checks_made;

#define CHECK(condition, ...)                                         \
  do {                                                                \
    ++checks_made;                                                    \
    if (!(condition)) {                                               \
      fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      fprintf(stderr, __VA_ARGS__);                                   \
      fprintf(stderr, "\n");                                          \
      exit(1);                                                        \
    }                                                                 \
  } while (0)

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15ull + 1) {}
  uint32_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32);
  }
  int below(int n) { return (int)(next() % (uint32_t)n); }
  float uniform() { return (float)(int32_t)next() * 0x1p-31f; }  // -1..1
};

// Memory aligned as a device allocation is, of no byte more than asked for: an address sanitizer
// then sees the first access out of bounds.
template <class T>
struct Buffer {
  T* data = nullptr;
  int64_t count = 0;
  Buffer() = default;
  explicit Buffer(int64_t n, int fill = 0xff) : count(n) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, (size_t)(n > 0 ? n : 1) * sizeof(T))) abort();
    data = (T*)memory;
    for (int64_t i = 0; i < n * (int64_t)sizeof(T); ++i) ((uint8_t*)memory)[i] = (uint8_t)fill;
  }
  Buffer(Buffer&& o) noexcept : data(o.data), count(o.count) { o.data = nullptr; }
  Buffer& operator=(Buffer&& o) noexcept {
    free(data);
    data = o.data;
    count = o.count;
    o.data = nullptr;
    return *this;
  }
  ~Buffer() { free(data); }
  T& operator[](int64_t i) { return data[i]; }
  const T& operator[](int64_t i) const { return data[i]; }
};

void check_layout();
void check_converters();
void check_schedules();
void check_kernels();
void check_other_kernels();
void check_gradient();
