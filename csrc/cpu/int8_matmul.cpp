// SPDX-License-Identifier: Apache-2.0
// qk_int8_matmul: checks, dense operands, threads.
//
// Kernels take both operands dense along k, as a transposed weight is; they need no packed layout.
// Rows of a that are not dense, not of whole dwords, or that would share cache sets, are copied
// once. Columns of b that
// are not dense are turned around in blocks of kBlockColumns, each of which serves all rows. Some
// kernels want all of a turned (kernels.h, TurnRows): that takes the place of its copy.
//
// Threads take ranges of columns; where there are fewer blocks of columns than threads they take
// rows too. No split runs along k.

#include <cstring>
#include <new>

#include "error.h"
#include "kernels.h"
#include "parallel.h"
#include "structs.h"

namespace qkern {
namespace {

constexpr int64_t kBlockColumns = 64;
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

// 8 x 8 bytes: byte j of rows[i] and byte i of rows[j] change places.
void transpose(uint64_t rows[8]) {
  const auto swap = [&](int apart, uint64_t low) {
    for (int i = 0; i < 8; ++i) {
      if (i & apart) continue;
      const uint64_t moved = (rows[i] >> (8 * apart) ^ rows[i + apart]) & low;
      rows[i] ^= moved << (8 * apart);
      rows[i + apart] ^= moved;
    }
  };
  swap(4, 0x00000000ffffffffu);
  swap(2, 0x0000ffff0000ffffu);
  swap(1, 0x00ff00ff00ff00ffu);
}

// to[i * to_stride + j] = from[i * step + j * across], i < rows, j < columns.
void copy_dense(const int8_t* from, int64_t step, int64_t across, int64_t rows, int64_t columns,
                int8_t* to, int64_t to_stride) {
  int64_t whole_rows = 0, whole_columns = 0;  // what blocks of 8 x 8 cover
  if (step == 1) {
    whole_rows = rows & ~(int64_t)7;
    whole_columns = columns & ~(int64_t)7;
    // All rows of eight columns at a time: that reads whole cache lines.
    for (int64_t j = 0; j < whole_columns; j += 8)
      for (int64_t i = 0; i < whole_rows; i += 8) {
        uint64_t block[8];
        for (int r = 0; r < 8; ++r) std::memcpy(&block[r], from + i + (j + r) * across, 8);
        transpose(block);
        for (int r = 0; r < 8; ++r) std::memcpy(to + (i + r) * to_stride + j, &block[r], 8);
      }
  }
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
