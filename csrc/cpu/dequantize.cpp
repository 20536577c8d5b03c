// SPDX-License-Identifier: Apache-2.0
// qk_dequantize: rows of a weight as floats, from canonical storage or from the packed layout.

#include <cstring>
#include <new>

#include "error.h"
#include "kernels.h"
#include "parallel.h"
#include "structs.h"

namespace qkern {
namespace {

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
  row.bits = s.bits;
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

// Decodes one row of the packed layout: values straight to `out`, in the order of the contract.
void packed_row(const Source& s, int64_t n, uint8_t* half_codes, float* out) {
  const Packed& w = s.packed;
  const int64_t half_index = n / kHalf, p = half_index / w.panel_halves;
  const int c = w.halves_of(p), half = (int)(half_index % w.panel_halves), r = (int)(n % kHalf);
  const uint8_t* panel = w.panel(p);
  float entries[256];
  for (int64_t g = 0; g < w.groups; ++g) {
    const uint8_t* block = w.group_block(panel, g, c);
    const int64_t padded = w.group_columns_padded(g);
    packed_codes(w, w.codes_of(block), half, c, 0, padded, half_codes, padded);
    const uint8_t* codes = half_codes + r * padded;
    float scale = 1.f, zero = (float)code_offset(w);
    if (w.scale_bytes)
      scale = load_float(w.scales_of(block, g, c) + half * w.scale_bytes, w.h.scale_stored, r);
    if (w.zero_bytes)
      zero = load_float(w.zeros_of(block, g, c) + half * w.zero_bytes, w.h.zero_stored, r);
    if (s.kind == QK_KIND_TABLE) {
      packed_table(w, w.half_tables(panel, g, c, half), r, entries);
      scale *= w.h.table_scale;
    }
    for (int64_t k = 0; k < w.group_columns(g); ++k)
      out[g * w.h.group + k] =
          s.kind == QK_KIND_TABLE ? scale * entries[codes[k]] : scale * ((float)codes[k] - zero);
  }
}

// Puts a row of float32 in input order and in the dtype of the output.
void write_row(const Source& s, const float* row, void* out, qk_dtype dtype) {
  for (int64_t k = 0; k < s.k; ++k) store_float(out, dtype, s.perm ? s.perm[k] : k, row[k]);
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

  const int64_t tasks =
      a->row_count * s.k < 1 << 13 ? 1 : min64(a->row_count, 4 * parallel_threads(a->parallel));
  // Kernels write any dtype in stored order; the packed layout is decoded to float32.
  const bool direct = !s.perm && (s.canonical || a->out_dtype == QK_F32);
  const int64_t row_bytes = direct ? 0 : round_up(4 * s.k, 64);
  const int64_t code_bytes =
      s.canonical ? 0 : kHalf * max64(s.packed.group_padded, s.packed.last_padded);
  const int64_t task_bytes = round_up(row_bytes + code_bytes, 64);
  uint8_t* scratch = new (std::nothrow) uint8_t[(size_t)max64(1, tasks * task_bytes)];
  if (!scratch)
    return fail(QK_OUT_OF_MEMORY, "qk_dequantize: no memory for %lld bytes of scratch",
                (long long)(tasks * task_bytes));
  parallel_for(a->parallel, tasks, [&](int64_t t) {
    float* row = reinterpret_cast<float*>(scratch + t * task_bytes);
    uint8_t* half_codes = scratch + t * task_bytes + row_bytes;
    for (int64_t i = a->row_count * t / tasks; i < a->row_count * (t + 1) / tasks; ++i) {
      const int64_t n = a->rows ? a->rows[i] : a->row_begin + i;
      uint8_t* out = (uint8_t*)a->out + i * a->out_row_stride * dtype_size(a->out_dtype);
      void* to = direct ? static_cast<void*>(out) : row;
      if (s.canonical) {
        DequantizeRow job = canonical_row(s, n);
        job.out = to;
        job.out_dtype = direct ? a->out_dtype : QK_F32;
        kernel->dequantize(job);
      } else {
        packed_row(s, n, half_codes, static_cast<float*>(to));
      }
      if (!direct) write_row(s, row, out, a->out_dtype);
    }
  });
  delete[] scratch;
  set_last_kernel(kernel->name);
  return QK_OK;
}
