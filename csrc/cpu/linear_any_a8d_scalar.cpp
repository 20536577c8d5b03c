// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T for every weight format, without vector instructions: the reference, and
// the file to copy for a new kernel.
//
// Numbers: S = exact int32 sum over a chunk; asymmetric t = fma(-zero, X, S);
// int8: acc = fma(t, scale, acc), y = fma(acc, x scale, bias);
// int8_group: acc = fma(t, scale * x scale of the chunk, acc), y = acc + bias.
// Codes of a half are unpacked once per chunk piece and reused over all rows of a block.

#include <string.h>

#include "kernels.h"

namespace qkern {
namespace {

constexpr int64_t kRows = 32;    // rows whose accumulators stay on the stack
constexpr int64_t kPiece = 512;  // columns unpacked at a time: a multiple of every unit

struct Half {
  const LinearJob& job;
  int64_t panel;
  int half;
  int64_t m0, rows;
};

float finish(const LinearJob& job, float acc, int64_t m, int64_t n) {
  if (job.w->h.activations == QK_ACT_INT8) {
    const float scale = job.q_scale[m];
    return job.bias ? fmaf(acc, scale, job.bias[n]) : acc * scale;
  }
  return job.bias ? acc + job.bias[n] : acc;
}

void add_chunk(const Half& h, const uint8_t* block, int64_t g, int64_t chunk, const int32_t* sums,
               float* acc) {
  const Packed& w = *h.job.w;
  const int c = w.halves_of(h.panel);
  const uint8_t* scales = w.scales_of(block, g, c) + h.half * w.scale_bytes;
  const uint8_t* zeros = w.zeros_of(block, g, c) + h.half * w.zero_bytes;
  for (int64_t i = 0; i < h.rows; ++i) {
    const int64_t at = (h.m0 + i) * h.job.chunks + chunk;
    for (int r = 0; r < kHalf; ++r) {
      float t = (float)sums[i * kHalf + r];
      if (w.zero_bytes) t = fmaf(-load_float(zeros, w.h.zero_stored, r), h.job.x_sum[at], t);
      float scale = w.scale_bytes ? load_float(scales, w.h.scale_stored, r) : 1.f;
      if (w.h.activations == QK_ACT_INT8_GROUP) scale *= h.job.q_scale[at];
      acc[i * kHalf + r] = fmaf(t, scale, acc[i * kHalf + r]);
    }
  }
}

void sum_piece(const Half& h, int64_t g, int64_t k0, int64_t columns, int32_t* sums) {
  const Packed& w = *h.job.w;
  const uint8_t* panel = w.panel(h.panel);
  const int c = w.halves_of(h.panel);
  uint8_t values[kHalf * kPiece];
  packed_codes(w, w.codes_of(w.group_block(panel, g, c)), h.half, c, k0, columns, values, kPiece);
  if (w.h.kind == QK_KIND_TABLE) {
    for (int r = 0; r < kHalf; ++r) {
      float entries[256];
      packed_table(w, w.half_tables(panel, g, c, h.half), r, entries);
      uint8_t* row = values + r * kPiece;
      for (int64_t k = 0; k < columns; ++k) row[k] = (uint8_t)((int)entries[row[k]] + 128);
    }
  }
  for (int64_t i = 0; i < h.rows; ++i) {
    const int8_t* q = h.job.q + (h.m0 + i) * h.job.q_stride + g * w.group_padded + k0;
    for (int r = 0; r < kHalf; ++r) {
      const uint8_t* v = values + r * kPiece;
      uint32_t sum = (uint32_t)sums[i * kHalf + r];
      for (int64_t k = 0; k < columns; ++k) sum += (uint32_t)((int32_t)v[k] * q[k]);
      sums[i * kHalf + r] = (int32_t)sum;
    }
  }
}

void compute_half(const Half& h) {
  const Packed& w = *h.job.w;
  float acc[kRows * kHalf] = {};
  for (int64_t g = 0; g < w.groups; ++g) {
    const uint8_t* block = w.group_block(w.panel(h.panel), g, w.halves_of(h.panel));
    const int64_t padded = w.group_columns_padded(g);
    for (int64_t c = 0; c * h.job.chunk < padded; ++c) {
      const int64_t chunk = g * h.job.chunks_per_group + c;
      const int64_t end = min64(padded, (c + 1) * h.job.chunk);
      int32_t sums[kRows * kHalf];
      for (int64_t i = 0; i < h.rows; ++i)
        for (int r = 0; r < kHalf; ++r)
          sums[i * kHalf + r] = h.job.q_init[(h.m0 + i) * h.job.chunks + chunk];
      for (int64_t k = c * h.job.chunk; k < end; k += kPiece)
        sum_piece(h, g, k, min64(kPiece, end - k), sums);
      add_chunk(h, block, g, chunk, sums, acc);
    }
  }
  const int64_t n0 = (h.panel * w.panel_halves + h.half) * kHalf;
  for (int64_t i = 0; i < h.rows; ++i)
    for (int64_t r = 0; r < kHalf && n0 + r < w.h.n; ++r)
      store_float(h.job.y, h.job.y_dtype, (h.m0 + i) * h.job.y_stride + n0 + r,
                  finish(h.job, acc[i * kHalf + r], h.m0 + i, n0 + r));
}

}  // namespace

void linear_any_a8d_scalar(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  for (int64_t p = p0; p < p1; ++p)
    for (int half = 0; half < job.w->halves_of(p); ++half)
      for (int64_t m = m0; m < m1; m += kRows)
        compute_half({job, p, half, m, min64(kRows, m1 - m)});
}

}  // namespace qkern
