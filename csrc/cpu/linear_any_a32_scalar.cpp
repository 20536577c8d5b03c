// SPDX-License-Identifier: Apache-2.0
// y = x . W^T with float activations for every weight format, without vector instructions: the
// reference for the order of all float additions.
//
// Numbers: per chunk of at most 1024 columns, dword lanes: one chain s = fma(x, v, s) over
// ascending k; row lanes: 16 chains, column k in chain k mod 16, folded in order. Asymmetric:
// s = fma(-zero, X, s). Then acc = fma(s, scale, acc); y = acc + bias.

#include "kernels.h"

namespace qkern {
namespace {

constexpr int64_t kRows = 32;  // rows per pass over the unpacked values

struct Half {
  const LinearJob& job;
  int64_t panel;
  int half;
  int64_t m0, rows;
};

// Values of one chunk: v[r][k], what the chain multiplies x with.
void unpack_values(const Half& h, int64_t g, int64_t k0, int64_t columns, float* values) {
  const Packed& w = *h.job.w;
  const uint8_t* panel = w.panel(h.panel);
  const int c = w.halves_of(h.panel);
  uint8_t codes[kHalf * kFloatChunk];
  packed_codes(w, w.codes_of(w.group_block(panel, g, c)), h.half, c, k0, columns, codes,
               kFloatChunk);
  float entries[256];
  if (w.h.kind == QK_KIND_INT)
    for (int code = 0; code < 1 << w.h.bits; ++code) entries[code] = (float)(code - code_offset(w));
  for (int r = 0; r < kHalf; ++r) {
    if (w.h.kind == QK_KIND_TABLE) packed_table(w, w.half_tables(panel, g, c, h.half), r, entries);
    for (int64_t k = 0; k < columns; ++k)
      values[r * kFloatChunk + k] = entries[codes[r * kFloatChunk + k]];
  }
}

float chain(const float* x, const float* v, int64_t columns) {
  float s = 0.f;
  for (int64_t k = 0; k < columns; ++k) s = fmaf(x[k], v[k], s);
  return s;
}

float lane_chains(const float* x, const float* v, int64_t columns) {
  float lanes[16] = {};
  for (int64_t k = 0; k < columns; ++k) lanes[k & 15] = fmaf(x[k], v[k], lanes[k & 15]);
  float s = lanes[0];
  for (int l = 1; l < 16; ++l) s += lanes[l];
  return s;
}

void compute_half(const Half& h) {
  const Packed& w = *h.job.w;
  const int c = w.halves_of(h.panel);
  float acc[kRows * kHalf] = {};
  float values[kHalf * kFloatChunk];
  for (int64_t g = 0; g < w.groups; ++g) {
    const uint8_t* block = w.group_block(w.panel(h.panel), g, c);
    const uint8_t* scales = w.scales_of(block, g, c) + h.half * w.scale_bytes;
    const uint8_t* zeros = w.zeros_of(block, g, c) + h.half * w.zero_bytes;
    const int64_t padded = w.group_columns_padded(g);
    for (int64_t k0 = 0; k0 < padded; k0 += kFloatChunk) {
      const int64_t columns = min64(kFloatChunk, padded - k0);
      const int64_t chunk = g * h.job.chunks_per_group + k0 / kFloatChunk;
      unpack_values(h, g, k0, columns, values);
      for (int64_t i = 0; i < h.rows; ++i)
        for (int r = 0; r < kHalf; ++r) {
          const float* x = h.job.x + (h.m0 + i) * h.job.x_stride + g * w.group_padded + k0;
          const float* v = values + r * kFloatChunk;
          float s = w.lanes == Lanes::kRow ? lane_chains(x, v, columns) : chain(x, v, columns);
          if (w.zero_bytes)
            s = fmaf(-load_float(zeros, w.h.zero_stored, r),
                     h.job.x_sum[(h.m0 + i) * h.job.chunks + chunk], s);
          float scale = w.scale_bytes ? load_float(scales, w.h.scale_stored, r) : 1.f;
          scale *= w.h.table_scale;
          acc[i * kHalf + r] = fmaf(s, scale, acc[i * kHalf + r]);
        }
    }
  }
  const int64_t n0 = (h.panel * w.panel_halves + h.half) * kHalf;
  for (int64_t i = 0; i < h.rows; ++i)
    for (int64_t r = 0; r < kHalf && n0 + r < w.h.n; ++r) {
      const float y = h.job.bias ? acc[i * kHalf + r] + h.job.bias[n0 + r] : acc[i * kHalf + r];
      store_float(h.job.y, h.job.y_dtype, (h.m0 + i) * h.job.y_stride + n0 + r, y);
    }
}

}  // namespace

void linear_any_a32_scalar(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  for (int64_t p = p0; p < p1; ++p)
    for (int half = 0; half < job.w->halves_of(p); ++half)
      for (int64_t m = m0; m < m1; m += kRows)
        compute_half({job, p, half, m, min64(kRows, m1 - m)});
}

}  // namespace qkern
