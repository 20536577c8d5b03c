// SPDX-License-Identifier: Apache-2.0
// qk_int8_matmul: checks, dense operands, threads.
//
// Kernels take both operands dense along k, as a transposed weight is; they need no packed layout.
// Rows of a that are not dense, not of whole dwords, or that would share cache sets, are copied
// once. Columns of b that are not dense are turned around in blocks of kBlockColumns, each of which
// serves all rows. Some kernels want all of a turned (kernels.h, TurnRows): that takes the place of
// its copy.
//
// Threads take ranges of columns; where there are fewer blocks of columns than threads they take
// rows too. No split runs along k.

#include <cstring>
#include <new>

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "error.h"
#include "kernels.h"
#include "parallel.h"
#include "structs.h"

namespace qkern {
namespace {

constexpr int64_t kBlockColumns = 128;
constexpr int64_t kAheadColumns = 32;     // of k, from a line of b to its prefetch
constexpr int64_t kFewRows = 8;           // up to here, a copy of a costs more than it brings
constexpr int64_t kLeastTurned = 7;       // from here on, turning all of a pays
constexpr int64_t kSerialWork = 1 << 17;  // multiply-adds below which a second thread costs more

qk_status check_args(const qk_int8_matmul_args* a) {
  if (qk_status s = check_parallel(a->parallel)) return s;
  if (a->m < 0 || a->n < 0 || a->k < 0)
    return fail(QK_INVALID_ARGUMENT,
                "qk_int8_matmul: m, n and k must not be negative, got %lld, %lld, %lld",
                (long long)a->m, (long long)a->n, (long long)a->k);
  if (a->k > kMatmulColumns)
    return fail(QK_INVALID_ARGUMENT,
                "qk_int8_matmul: with more than %lld columns int32 may overflow, k is %lld",
                (long long)kMatmulColumns, (long long)a->k);
  if (a->m == 0 || a->n == 0) return QK_OK;
  if (!a->c || (a->k > 0 && (!a->a || !a->b)))
    return fail(QK_INVALID_ARGUMENT, "qk_int8_matmul: a, b and c must not be NULL");
  if (a->m > 1 && a->c_row_stride < a->n)
    return fail(QK_INVALID_ARGUMENT,
                "qk_int8_matmul: rows of c need %lld elements, their stride is %lld",
                (long long)a->n, (long long)a->c_row_stride);
  return QK_OK;
}

#if defined(__SSE2__)
using Bytes = __m128i;
Bytes load(const int8_t* p) { return _mm_loadu_si128(reinterpret_cast<const Bytes*>(p)); }
void store(int8_t* p, Bytes v) { _mm_storeu_si128(reinterpret_cast<Bytes*>(p), v); }
Bytes low_pairs(Bytes a, Bytes b) { return _mm_unpacklo_epi8(a, b); }
Bytes high_pairs(Bytes a, Bytes b) { return _mm_unpackhi_epi8(a, b); }
#elif defined(__ARM_NEON)
using Bytes = int8x16_t;
Bytes load(const int8_t* p) { return vld1q_s8(p); }
void store(int8_t* p, Bytes v) { vst1q_s8(p, v); }
Bytes low_pairs(Bytes a, Bytes b) { return vzip1q_s8(a, b); }
Bytes high_pairs(Bytes a, Bytes b) { return vzip2q_s8(a, b); }
#else
struct Bytes {
  int8_t byte[16];
};
Bytes load(const int8_t* p) {
  Bytes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
void store(int8_t* p, Bytes v) { std::memcpy(p, &v, sizeof v); }
Bytes pairs(const int8_t* a, const int8_t* b) {
  Bytes v;
  for (int i = 0; i < 16; ++i) v.byte[i] = i % 2 ? b[i / 2] : a[i / 2];
  return v;
}
Bytes low_pairs(Bytes a, Bytes b) { return pairs(a.byte, b.byte); }
Bytes high_pairs(Bytes a, Bytes b) { return pairs(a.byte + 8, b.byte + 8); }
#endif

constexpr int64_t kSide = 16;

// Rows i and i + 8 are dealt to rows 2 i and 2 i + 1.
inline void deal(const Bytes (&v)[kSide], Bytes (&to)[kSide]) {
#pragma GCC unroll 8
  for (int i = 0; i < kSide / 2; ++i) {
    to[2 * i] = low_pairs(v[i], v[i + kSide / 2]);
    to[2 * i + 1] = high_pairs(v[i], v[i + kSide / 2]);
  }
}

// copy_dense of kSide x kSide bytes, where `step` is 1: they are dealt four times.
void transpose(const int8_t* from, int64_t across, int8_t* to, int64_t to_stride) {
  Bytes v[kSide], dealt[kSide];
#pragma GCC unroll 16
  for (int j = 0; j < kSide; ++j) v[j] = load(from + j * across);
  deal(v, dealt), deal(dealt, v), deal(v, dealt), deal(dealt, v);
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) store(to + i * to_stride, v[i]);
}

// copy_dense where `step` is 1 and both numbers are multiples of kSide, rows at most kBlockColumns.
// All rows of kSide columns at a time: that reads whole cache lines. Mostly each column is in a
// page of its own and all in one set of the first cache, so they are asked for early, to the
// second, and copied once. (4096 x 4096, one thread, M = 1 with all: 3.5 ms; one line of a page at
// a time 4.8, without the copy 5.6, blocks of 8 x 8 in integer registers 9.1.)
void turn_blocks(const int8_t* from, int64_t across, int64_t rows, int64_t columns, int8_t* to,
                 int64_t to_stride) {
  alignas(64) int8_t lines[kSide][kBlockColumns];
  for (int64_t j = 0; j < columns; j += kSide) {
    const int64_t ahead = j + kAheadColumns;
    for (int64_t c = ahead; c < min64(ahead + kSide, columns); ++c)
      for (int64_t i = 0; i < rows; i += 64) __builtin_prefetch(from + i + c * across, 0, 2);
    for (int64_t c = 0; c < kSide; ++c) {
      const int8_t* line = from + (j + c) * across;
      // Of a number that it does not know GCC makes `rep movs`: 3 ms more.
      if (rows == kBlockColumns)
        std::memcpy(lines[c], line, kBlockColumns);
      else
        std::memcpy(lines[c], line, (size_t)rows);
    }
    for (int64_t i = 0; i < rows; i += kSide)
      transpose(lines[0] + i, kBlockColumns, to + i * to_stride + j, to_stride);
  }
}

// to[i * to_stride + j] = from[i * step + j * across], i < rows, j < columns.
void copy_dense(const int8_t* from, int64_t step, int64_t across, int64_t rows, int64_t columns,
                int8_t* to, int64_t to_stride) {
  const int64_t whole_rows = step == 1 ? rows / kSide * kSide : 0;
  const int64_t whole_columns = columns / kSide * kSide;
  for (int64_t i = 0; i < whole_rows; i += kBlockColumns)
    turn_blocks(from + i, across, min64(kBlockColumns, whole_rows - i), whole_columns,
                to + i * to_stride, to_stride);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t begin = i < whole_rows ? whole_columns : 0;
    const int8_t* row = from + i * step;
    if (across == 1)
      std::memcpy(to + i * to_stride + begin, row + begin, (size_t)(columns - begin));
    else
      for (int64_t j = begin; j < columns; ++j) to[i * to_stride + j] = row[j * across];
  }
}

// An odd number of cache lines, so that rows do not share cache sets.
int64_t dense_stride(int64_t k) { return (ceil_div(k, 64) | 1) * 64; }

// Rows this many bytes apart land in a few cache sets, which hold 8 to 12 of them.
bool shares_cache_sets(int64_t bytes) {
  const int64_t offset = bytes & 1023;
  return offset < 64 || offset > 1024 - 64;
}

struct Memory {
  int8_t* block = nullptr;
  int8_t* data = nullptr;  // at a multiple of 64 bytes
  bool take(int64_t bytes) {
    block = new (std::nothrow) int8_t[(size_t)bytes + 63];
    data = block + (-reinterpret_cast<uintptr_t>(block) & 63);
    return block != nullptr;
  }
  ~Memory() { delete[] block; }
};

}  // namespace
}  // namespace qkern

using namespace qkern;

extern "C" qk_status qk_int8_matmul(const qk_int8_matmul_args* args) {
  qk_int8_matmul_args a;
  if (qk_status status = read_struct("qk_int8_matmul_args", args, &a)) return status;
  if (qk_status status = check_args(&a)) return status;
  qk_status status = QK_OK;
  const KernelRow* kernel = select_named(Op::kMatmul, a.kernel, &status);
  if (!kernel) return status;
  if (a.m == 0 || a.n == 0) return QK_OK;

  const bool turns = kernel->turn_rows && a.m >= kLeastTurned && a.k > 0;
  const bool lies_dense = a.a_col_stride == 1 || a.k <= 1;
  const bool dense_a = lies_dense && (turns || a.m <= kFewRows || a.n <= kFewRows ||
                                      (a.k % 4 == 0 && !shares_cache_sets(a.a_row_stride)));
  const bool dense_b = a.b_row_stride == 1 || a.k <= 1;
  const int threads = a.m * a.n * max64(a.k, 1) < kSerialWork ? 1 : parallel_threads(a.parallel);
  const int64_t blocks = ceil_div(a.n, kBlockColumns), columns = min64(blocks, threads);
  const int64_t unit = turns ? kTurnedRows : 1, units = ceil_div(a.m, unit);
  const int64_t rows = blocks < threads ? min64(units, threads / blocks) : 1;
  const int64_t stride = dense_stride(a.k);
  Memory copy_a, copy_b, turned;
  if ((!dense_a && !copy_a.take(a.m * stride)) ||
      (turns && !turned.take(units * turned_tile_bytes(a.k))) ||
      (!dense_b && !copy_b.take(columns * rows * kBlockColumns * stride)))
    return fail(QK_OUT_OF_MEMORY, "qk_int8_matmul: no memory for dense operands of %lld columns",
                (long long)a.k);
  MatmulJob job = {a.a, a.a_row_stride, a.b,          a.b_col_stride, a.k,
                   a.c, a.c_row_stride, a.k % 4 == 0, turned.data};
  if (!dense_a) {
    parallel_for(a.parallel, min64(threads, a.m), [&](int64_t t) {
      const int64_t tasks = min64(threads, a.m), r0 = a.m * t / tasks, r1 = a.m * (t + 1) / tasks;
      copy_dense(a.a + r0 * a.a_row_stride, a.a_row_stride, a.a_col_stride, r1 - r0, a.k,
                 copy_a.data + r0 * stride, stride);
      for (int64_t r = r0; r < r1; ++r)
        std::memset(copy_a.data + r * stride + a.k, 0, (size_t)(stride - a.k));
    });
    job.a_padded = true;
    job.a = copy_a.data;
    job.a_stride = stride;
  }
  if (turns) {
    const int64_t tasks = min64(threads, units);
    parallel_for(a.parallel, tasks, [&](int64_t t) {
      kernel->turn_rows(job, a.m, units * t / tasks, units * (t + 1) / tasks, turned.data);
    });
  }
  parallel_for(a.parallel, columns * rows, [&](int64_t t) {
    const int64_t c = t % columns, r = t / columns;
    const int64_t m0 = units * r / rows * unit, m1 = min64(a.m, units * (r + 1) / rows * unit);
    const int64_t n0 = blocks * c / columns * kBlockColumns;
    const int64_t n1 = min64(a.n, blocks * (c + 1) / columns * kBlockColumns);
    if (dense_b) return kernel->matmul(job, m0, m1, n0, n1);
    int8_t* block = copy_b.data + t * kBlockColumns * stride;
    for (int64_t n = n0; n < n1; n += kBlockColumns) {
      const int64_t count = min64(kBlockColumns, n1 - n);
      copy_dense(a.b + n * a.b_col_stride, a.b_col_stride, a.b_row_stride, count, a.k, block,
                 stride);
      MatmulJob part = job;
      part.b = block;
      part.b_stride = stride;
      part.c = job.c + n;
      kernel->matmul(part, m0, m1, 0, count);
    }
  });
  set_last_kernel(kernel->name);
  return QK_OK;
}
