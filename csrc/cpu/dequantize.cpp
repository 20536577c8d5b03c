// SPDX-License-Identifier: Apache-2.0
// qk_dequantize: rows of a weight as floats, from canonical storage or from the packed layout.

#include <atomic>
#include <cstring>
#include <new>

#include "error.h"
#include "kernels.h"
#include "packed_rows.h"
#include "parallel.h"
#include "structs.h"

namespace qkern {
namespace {

constexpr int64_t kPastCaches = 32 << 20;  // bytes of results that no cache is meant to keep

struct Source {
  qk_kind kind;
  int bits;
  int64_t n, k, group, groups;
  bool canonical;
  qk_weight weight;  // where canonical
  Packed packed;
  const int32_t* perm;
};

qk_status open_source(const qk_dequantize_args& a, Source* s) {
  if (a.weight) {
    int64_t unused;
    if (qk_status status = qk_packed_bytes(a.weight, &unused)) return status;  // checks it
    if (qk_status status = read_struct("qk_weight", a.weight, &s->weight)) return status;
    const qk_weight& w = s->weight;
    s->kind = w.kind;
    s->bits = w.bits;
    s->n = w.n;
    s->k = w.k;
    s->group = w.group > 0 && w.group < w.k ? w.group : w.k;
    s->canonical = true;
    s->perm = w.perm;
  } else {
    if (qk_status status = packed_open(a.packed, a.packed_bytes, &s->packed)) return status;
    const PackedHeader& h = s->packed.h;
    s->kind = h.kind;
    s->bits = h.bits;
    s->n = h.n;
    s->k = h.k;
    s->group = h.group;
    s->perm = s->packed.perm;
  }
  s->groups = ceil_div(s->k, s->group);
  return QK_OK;
}

DequantizeRow canonical_row(const Source& s, int64_t n) {
  const qk_weight& w = s.weight;
  DequantizeRow row = {};
  row.codes = w.codes + n * w.codes_stride_bytes;
  row.bits = row.stream_bits = s.bits;
  row.k = s.k;
  row.group = s.group;
  row.scale_dtype = w.scale_dtype;
  if (w.scales)
    row.scales = (const uint8_t*)w.scales + n * w.scales_stride * dtype_size(w.scale_dtype);
  row.zero_dtype = w.zero_dtype;
  if (w.zeros) row.zeros = (const uint8_t*)w.zeros + n * w.zeros_stride * dtype_size(w.zero_dtype);
  if (s.kind == QK_KIND_TABLE) {
    const int64_t entries = (int64_t)1 << s.bits;
    const bool grouped = w.table_per >= QK_TABLE_PER_GROUP;  // or tiled
    const int64_t first = w.table_per == QK_TABLE_PER_TENSOR ? 0
                          : w.table_per == QK_TABLE_PER_TILE ? n / kTileOutputsPerTable * s.groups
                          : grouped                          ? n * s.groups
                                                             : n;
    row.table = w.codebook + first * entries;
    row.table_group_stride = grouped ? entries : 0;
  }
  row.table_scale = w.kind == QK_KIND_TABLE ? w.table_scale : 1.f;
  return row;
}

qk_status check_rows(const qk_dequantize_args& a, int64_t n) {
  if (!a.rows && (a.row_begin < 0 || a.row_count < 0 || a.row_begin > n - a.row_count))
    return fail(QK_INVALID_ARGUMENT, "qk_dequantize: rows %lld..%lld of a weight with %lld rows",
                (long long)a.row_begin, (long long)(a.row_begin + a.row_count), (long long)n);
  for (int64_t i = 0; a.rows && i < a.row_count; ++i)
    if (a.rows[i] < 0 || a.rows[i] >= n)
      return fail(QK_INVALID_ARGUMENT, "row index %lld at place %lld is not in 0..%lld",
                  (long long)a.rows[i], (long long)i, (long long)n - 1);
  return QK_OK;
}

bool past_caches(const qk_dequantize_args& a, int64_t k) {
  return a.row_count * k * dtype_size(a.out_dtype) >= kPastCaches;
}

int64_t row_of(const qk_dequantize_args& a, int64_t i) {
  return a.rows ? a.rows[i] : a.row_begin + i;
}

uint8_t* out_of(const qk_dequantize_args& a, int64_t i) {
  return (uint8_t*)a.out + i * a.out_row_stride * dtype_size(a.out_dtype);
}

// Rows in equal shares; of a packed weight, rows of a half stay together.
struct Tasks {
  int64_t rows, align, offset, count;

  Tasks(const qk_dequantize_args& a, const Source& s)
      : rows(a.row_count),
        align(s.canonical || a.rows ? 1 : kHalf),
        offset(align == 1 ? 0 : a.row_begin % kHalf),
        count(a.row_count * s.k < 1 << 13 ? 1
                                          : min64(a.row_count, 4 * parallel_threads(a.parallel))) {}
  int64_t begin(int64_t t) const {
    const int64_t even = rows * t / count;
    return t == count ? rows : max64(0, (even + offset) / align * align - offset);
  }
};

void decode_canonical(const qk_dequantize_args& a, const Source& s, const KernelRow& kernel,
                      int64_t begin, int64_t end, uint8_t* scratch) {
  for (int64_t i = begin; i < end; ++i) {
    DequantizeRow row = canonical_row(s, row_of(a, i));
    row.out = s.perm ? scratch : out_of(a, i);
    row.out_dtype = a.out_dtype;
    row.past_caches = !s.perm && past_caches(a, s.k);
    kernel.dequantize(row);
    if (s.perm) scatter(scratch, a.out_dtype, s.k, s.perm, out_of(a, i));
  }
}

// Rows that follow each other within a half are decoded together.
void decode_packed(const qk_dequantize_args& a, PackedDecoder decoder, int64_t begin, int64_t end) {
  const int64_t stride = a.out_row_stride * dtype_size(a.out_dtype);
  for (int64_t i = begin, count; i < end; i += count) {
    const int64_t n = row_of(a, i), most = min64(end - i, kHalf - n % kHalf);
    for (count = 1; count < most && row_of(a, i + count) == n + count;) ++count;
    decoder.rows(n, (int)count, out_of(a, i), stride);
  }
}

}  // namespace
}  // namespace qkern

using namespace qkern;

extern "C" qk_status qk_dequantize(const qk_dequantize_args* args) {
  qk_dequantize_args known;
  if (qk_status s = read_struct("qk_dequantize_args", args, &known)) return s;
  if (qk_status s = check_parallel(known.parallel)) return s;
  const qk_dequantize_args* a = &known;
  if (a->out_dtype != QK_F32 && a->out_dtype != QK_F16 && a->out_dtype != QK_BF16)
    return fail(QK_INVALID_ARGUMENT, "qk_dequantize: out must be float32, float16 or bfloat16");
  Source s = {};
  if (qk_status status = open_source(*a, &s)) return status;
  if (qk_status status = check_rows(*a, s.n)) return status;
  if (a->row_count <= 0) return QK_OK;
  if (!a->out || (a->row_count > 1 && a->out_row_stride < s.k))
    return fail(QK_INVALID_ARGUMENT,
                "qk_dequantize: rows of out need %lld elements, stride is %lld", (long long)s.k,
                (long long)a->out_row_stride);
  qk_status status = QK_OK;
  const KernelRow* kernel = select_dequantize(s.kind, s.bits, a->kernel, &status);
  if (!kernel) return status;

  // Kernels write rows of any dtype in stored order; columns of an act-order weight are scattered.
  const int64_t size = dtype_size(a->out_dtype);
  const int64_t row_bytes = s.perm ? round_up(size * s.k, 64) : 0;
  const int64_t task_bytes = s.canonical ? row_bytes : PackedDecoder::scratch_bytes();
  const Tasks tasks(*a, s);
  uint8_t* scratch = new (std::nothrow) uint8_t[(size_t)max64(1, tasks.count * task_bytes)];
  if (!scratch)
    return fail(QK_OUT_OF_MEMORY, "qk_dequantize: no memory for %lld bytes of scratch",
                (long long)(tasks.count * task_bytes));
  const UnpackKernel unpack = select_row(Op::kUnpack).unpack;
  parallel_for(a->parallel, tasks.count, [&](int64_t t) {
    uint8_t* own = scratch + t * task_bytes;
    const int64_t begin = tasks.begin(t), end = tasks.begin(t + 1);
    if (s.canonical)
      decode_canonical(*a, s, *kernel, begin, end, own);
    else
      decode_packed(*a,
                    PackedDecoder(s.packed, kernel->dequantize, unpack, a->out_dtype,
                                  past_caches(*a, s.k), own),
                    begin, end);
    // Streamed stores are ordered by nothing else before other threads read the results.
    std::atomic_thread_fence(std::memory_order_seq_cst);
  });
  delete[] scratch;
  set_last_kernel(kernel->name);
  return QK_OK;
}
