// SPDX-License-Identifier: Apache-2.0
// What a CPU kernel is given, and the registry of all of them (kernels.inc, best first).
//
// A kernel computes its rectangle of the output from one job. It does not allocate, start
// threads, throw, log, read the environment or pack; any rectangle gives the same bits as that
// part of the whole. Which rounding happens where is part of the contract (csrc/README.md,
// "Numbers"): every kernel of an operation gives the same bits.
#pragma once

#include <stdint.h>

#include "layout.h"

namespace qkern {

constexpr int64_t kFloatChunk = 1024;      // columns that one float32 partial sum may span
constexpr int64_t kIntChunk = 65536;       // columns whose int32 sum cannot overflow (255 * 127)
constexpr int64_t kActivationGroup = 128;  // int8_group where the weight has one scale per row
constexpr int64_t kReadPadding = 64;       // bytes that may be read past a row of activations

// Activations ready for a kernel: columns in packed order (perm applied, groups padded with 0).
struct LinearJob {
  const Packed* w;
  int64_t m;
  // Columns are summed in chunks: group g has chunks chunk_begin(g) .. ; chunk c of a group covers
  // its columns [c * chunk, min((c + 1) * chunk, padded length)).
  int64_t chunk;
  int64_t chunks_per_group;  // of a full group
  int64_t chunks;            // of a row
  // Float activations.
  const float* x;
  int64_t x_stride;
  // Int8 activations.
  const int8_t* q;
  int64_t q_stride;
  const float* q_scale;   // int8: [m]; int8_group: [m][chunks]; table_scale is in it
  const int32_t* q_init;  // [m][chunks]: -code_offset * sum of q over the chunk
  // Asymmetric weights: [m][chunks] sum of x (lane order) or of q.
  const float* x_sum;
  // Output.
  const float* bias;  // [n] or NULL
  void* y;
  qk_dtype y_dtype;
  int64_t y_stride;

  int64_t chunks_of(int64_t columns_padded) const { return ceil_div(columns_padded, chunk); }
};

// Rows [m0, m1) times panels [p0, p1).
using LinearKernel = void (*)(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1);

// One dense row of F32, F16 or BF16: int8 codes and scales per group (qkern.h). Group g goes to
// q + g * q_group_stride.
using QuantizeKernel = void (*)(const void* x, qk_dtype dtype, int64_t k, int64_t group, int8_t* q,
                                int64_t q_group_stride, float* scales);

// One dense row of F16 or BF16 to float32.
using ConvertKernel = void (*)(const void* x, qk_dtype dtype, int64_t k, float* out);

// One row of canonical storage (or of codes, one byte each) to floats [k], stored order. `tables`:
// the float table of the row, or of its first group where there is one per group; NULL for Int.
struct DequantizeRow {
  const uint8_t* codes;
  int bits;
  int stream_bits;  // from a code to the next: bits, or 8
  int64_t k, group;
  const void* scales;  // at the row's first group; NULL: 1
  qk_dtype scale_dtype;
  const void* zeros;  // at the row's first group; NULL: 2^(b-1)
  qk_dtype zero_dtype;
  const float* table;
  int64_t table_group_stride;  // floats from a group's table to the next group's; 0: shared
  float table_scale;
  void* out;
  qk_dtype out_dtype;  // F32, F16 or BF16
  // The results are more than caches hold: a kernel may store them past the caches, which saves
  // reading the lines first. Whoever sets this orders such stores (atomic_thread_fence) at the end.
  bool past_caches;
};
using DequantizeKernel = void (*)(const DequantizeRow& row);

// c = a . b of int8, exactly, columns of both dense along k: a[m * a_stride + k],
// b[n * b_stride + k]. k is at most kMatmulColumns.
struct MatmulJob {
  const int8_t* a;
  int64_t a_stride;
  const int8_t* b;
  int64_t b_stride;
  int64_t k;
  int32_t* c;
  int64_t c_stride;
  bool a_padded;         // rows of a may be read up to the next multiple of 4, and are 0 there
  const int8_t* turned;  // what TurnRows made of all rows of a; NULL where it was not asked
};
constexpr int64_t kMatmulColumns = 131071;  // times 128 * 128 is less than 2^31

// Rows [m0, m1) times columns [n0, n1).
using MatmulKernel = void (*)(const MatmulJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1);

// Some matmul kernels want a, once for all tasks, as [ceil(m / 16)][ceil(k / 64)][64 / 4][16][4]:
// four columns of 16 rows at a time, zeros beyond m and k. This makes tiles [t0, t1) of rows, each
// turned_tile_bytes(k), in `to`, which begins at tile 0 and at a multiple of 64 bytes. Such a
// kernel takes rows from a multiple of kTurnedRows on.
using TurnRows = void (*)(const MatmulJob& job, int64_t m, int64_t t0, int64_t t1, int8_t* to);
constexpr int64_t kTurnedRows = 16;
static inline int64_t turned_tile_bytes(int64_t k) { return ceil_div(k, 64) * 64 * kTurnedRows; }
void turn_rows_avx512(const MatmulJob& job, int64_t m, int64_t t0, int64_t t1, int8_t* to);

// What packed_codes does (layout.h).
using UnpackKernel = void (*)(const Packed& w, const uint8_t* group_codes, int half, int halves,
                              int64_t k0, int64_t columns, uint8_t* out, int64_t out_stride);

enum class Op : int32_t { kLinear, kQuantize, kConvert, kDequantize, kMatmul, kUnpack };

// Which weights and activations a row serves, as bit masks.
constexpr uint32_t kInt = 1u << QK_KIND_INT, kTable = 1u << QK_KIND_TABLE;
constexpr uint32_t kDwordLanes = 1u << (int)Lanes::kDword, kRowLanes = 1u << (int)Lanes::kRow;
constexpr uint32_t kTileTables = 1u << 2;  // dword lanes whose tables are those of tiles
constexpr uint32_t kAnyLanes = kDwordLanes | kRowLanes | kTileTables;
static inline uint32_t lanes_mask(const Packed& w) {
  return w.tile_table_bytes ? kTileTables : 1u << (int)w.lanes;
}
constexpr uint32_t kFloat = 1u << QK_ACT_FLOAT;
constexpr uint32_t kInt8 = 1u << QK_ACT_INT8 | 1u << QK_ACT_INT8_GROUP;
constexpr uint32_t kAllBits = 0x1fe;  // bit b: codes of b bits
constexpr uint32_t bits_mask(int b) { return 1u << b; }

struct KernelRow {
  Op op;
  const char* name;
  qk_isa isa;
  uint32_t kinds, lanes, bits, activations;
  LinearKernel linear;
  QuantizeKernel quantize;
  ConvertKernel convert;
  DequantizeKernel dequantize;
  MatmulKernel matmul = nullptr;
  UnpackKernel unpack = nullptr;
  TurnRows turn_rows = nullptr;
};

extern const KernelRow kKernels[];
extern const int kKernelCount;

// Why the row cannot serve this weight now, or NULL where it can. Plain words.
const char* kernel_refuses(const KernelRow& row, const Packed& w);

// Best usable row of an operation that has no weights to look at.
const KernelRow& select_row(Op op);
// Best usable row for a weight; with `name`, exactly that row or a failure in *status.
const KernelRow* select_linear(const Packed& w, const char* name, qk_status* status);
const KernelRow* select_dequantize(qk_kind kind, int bits, const char* name, qk_status* status);
// The row with this name for an operation without weights, or the best where name is NULL.
const KernelRow* select_named(Op op, const char* name, qk_status* status);

bool isa_usable(qk_isa isa);
void set_last_kernel(const char* name);

}  // namespace qkern
