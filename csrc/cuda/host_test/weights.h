// SPDX-License-Identifier: Apache-2.0
// Random weights in canonical storage, packed on the host by the packer's own functions.
#pragma once

#include "../dequantize.cuh"
#include "../pack.cuh"
#include "check.h"

struct Case {
  int kind, bits, activations;
  int64_t n, k, group;
  int table_per = QK_TABLE_PER_TENSOR;
  int scale_dtype = QK_F32, zero_dtype = -1;  // -1: none
  bool perm = false;
  bool exact = true;  // sums that float32 holds exactly: powers of two as scales, integers else
};

struct HostWeight {
  qk_weight w = {};
  Buffer<uint8_t> codes, packed;
  Buffer<uint8_t> scales, zeros;
  Buffer<float> codebook;
  Buffer<int32_t> perm;
  qkern::cuda::Layout layout;

  int code(int64_t row, int64_t column) const {
    int value = 0;
    for (int bit = 0; bit < w.bits; ++bit)
      value |= (int)qkern::cuda::canonical_bit(codes.data, w.codes_stride_bytes, w.bits, row,
                                               column, bit)
               << bit;
    return value;
  }
  double scale(int64_t row, int64_t g) const {
    return w.scales ? qkern::load_float(scales.data, w.scale_dtype, row * w.scales_stride + g) : 1.;
  }
  double zero(int64_t row, int64_t g) const {
    return w.zeros ? qkern::load_float(zeros.data, w.zero_dtype, row * w.zeros_stride + g)
                   : (double)(1 << (w.bits - 1));
  }
  double entry(int64_t row, int64_t g, int code) const {
    return codebook[layout.table_index(row, g) + code];
  }
  // The weight in exact arithmetic, and the magnitude that rounding errors are measured by.
  double value(int64_t row, int64_t column, double* magnitude = nullptr) const {
    const int64_t g = column / layout.group;
    if (w.kind == QK_KIND_TABLE) {
      const double v = scale(row, g) * w.table_scale * entry(row, g, code(row, column));
      if (magnitude) *magnitude = v < 0 ? -v : v;
      return v;
    }
    const double c = code(row, column), z = zero(row, g), half = 1 << (w.bits - 1);
    if (magnitude) {
      const double s = scale(row, g), a = c - half, b = z - half;
      *magnitude = (s < 0 ? -s : s) * ((a < 0 ? -a : a) + (b < 0 ? -b : b));
    }
    return scale(row, g) * (c - z);
  }
};

inline void store_any(uint8_t* to, int dtype, int64_t i, float value) {
  if (dtype == QK_U8)
    to[i] = (uint8_t)value;
  else
    qkern::store_float(to, dtype, i, value);
}

inline void fill_numbers(Random& random, const Case& c, HostWeight* h) {
  const int64_t cells = c.n * h->layout.groups;
  if (h->w.scales)
    for (int64_t i = 0; i < cells; ++i) {
      if (c.scale_dtype == QK_E8M0)
        h->scales[i] = (uint8_t)(120 + random.below(10));
      else if (c.scale_dtype == QK_E4M3)
        h->scales[i] = (uint8_t)(c.exact ? (1 + random.below(14)) << 3 : random.below(126));
      else
        store_any(h->scales.data, c.scale_dtype, i,
                  c.exact ? ldexpf(1.f, random.below(4)) : random.uniform() * 0.1f);
    }
  if (h->w.zeros)
    for (int64_t i = 0; i < cells; ++i)
      store_any(h->zeros.data, c.zero_dtype, i,
                c.zero_dtype == QK_U8 || c.exact ? (float)random.below(1 << c.bits)
                                                 : (1.f + random.uniform()) * (1 << (c.bits - 1)));
  // Integers with int8 activations, float8 numbers where a table serves a tile.
  for (int64_t i = 0; i < h->codebook.count; ++i)
    h->codebook[i] = c.exact                         ? (float)(random.below(16) - 8)
                     : c.activations != QK_ACT_FLOAT ? (float)(random.below(256) - 128)
                     : c.table_per == QK_TABLE_PER_TILE
                         ? qkern::e4m3_to_float((uint8_t)random.below(126))
                         : random.uniform() * 0.02f;
}

inline HostWeight make_weight(const Case& c, uint64_t seed) {
  using namespace qkern::cuda;
  Random random(seed);
  HostWeight h;
  qk_weight& w = h.w;
  w.struct_size = sizeof w;
  w.kind = c.kind;
  w.bits = c.bits;
  w.activations = c.activations;
  w.n = c.n;
  w.k = c.k;
  w.group = c.group;
  w.table_per = c.table_per;
  w.table_scale = c.kind == QK_KIND_TABLE ? (c.exact ? 0.5f : 0.75f) : 1.f;
  w.scale_dtype = c.scale_dtype;
  w.zero_dtype = c.zero_dtype;
  static const uint8_t present = 0;
  w.scales = c.scale_dtype >= 0 ? &present : nullptr;
  w.zeros = c.zero_dtype >= 0 ? &present : nullptr;
  w.codebook = c.kind == QK_KIND_TABLE ? (const float*)&present : nullptr;
  w.perm = c.perm ? (const int32_t*)&present : nullptr;
  const char* const reason = make_layout(w, &h.layout);
  CHECK(!reason, "%s", reason);
  const Layout& l = h.layout;
  const int64_t cells = c.n * l.groups;
  w.codes_stride_bytes = (c.k * c.bits + 7) / 8 + 3;
  w.scales_stride = w.zeros_stride = l.groups;
  h.codes = Buffer<uint8_t>(c.n * w.codes_stride_bytes);
  for (int64_t i = 0; i < h.codes.count; ++i) h.codes[i] = (uint8_t)random.next();
  if (w.scales) h.scales = Buffer<uint8_t>(cells * qkern::dtype_size(c.scale_dtype));
  if (w.zeros) h.zeros = Buffer<uint8_t>(cells * qkern::dtype_size(c.zero_dtype));
  h.codebook = Buffer<float>(l.table_entries());
  fill_numbers(random, c, &h);
  w.codes = h.codes.data;
  if (w.scales) w.scales = h.scales.data;
  if (w.zeros) w.zeros = h.zeros.data;
  if (w.codebook) w.codebook = h.codebook.data;
  if (c.perm) {
    h.perm = Buffer<int32_t>(c.k);
    for (int64_t i = 0; i < c.k; ++i) h.perm[i] = (int32_t)i;
    for (int64_t i = c.k - 1; i > 0; --i) {
      const int64_t j = random.below((int)i + 1);
      const int32_t t = h.perm[i];
      h.perm[i] = h.perm[j];
      h.perm[j] = t;
    }
    w.perm = h.perm.data;
  }
  h.packed = Buffer<uint8_t>(l.total_bytes);
  uint8_t* const p = h.packed.data;
  for (int64_t i = 0; i < l.row_tiles * l.k_blocks * l.block_bytes / 4; ++i)
    ((uint32_t*)(p + l.codes_offset))[i] = pack_codes_word(l, w.codes, w.codes_stride_bytes, i);
  for (int64_t i = 0; i < l.row_tiles * kTileRows * l.groups; ++i) {
    const int64_t row = i / l.groups, g = i % l.groups, at = l.scale_index(row, g);
    for (int part = 0; part < 2; ++part) {
      const void* from = part ? w.zeros : w.scales;
      const qk_dtype dtype = part ? l.zero_dtype : l.scale_dtype;
      const qk_dtype stored = part ? l.zero_stored : l.scale_stored;
      uint8_t* to = p + (part ? l.zeros_offset : l.scales_offset);
      if (!from) continue;
      if (row < l.n)
        convert_number(from, dtype, row * l.groups + g, to, stored, at);
      else
        store_number(to, stored, at, 0.f);
    }
  }
  for (int64_t i = 0; i < h.codebook.count; ++i) ((float*)(p + l.table_offset))[i] = h.codebook[i];
  for (int64_t i = 0; i < h.perm.count; ++i) ((int32_t*)(p + l.perm_offset))[i] = h.perm[i];
  for (int64_t i = 0; i < block_table_count(l); ++i) pack_block_table(l, i, p);
  return h;
}

// The contract, written apart from the kernels: w = fl(scale * fl(code - zero)) or
// fl(fl(scale * table_scale) * entry).
inline float contract(const HostWeight& h, int64_t row, int64_t column) {
  const int64_t g = column / h.layout.group;
  const float scale = (float)h.scale(row, g);
  const int code = h.code(row, column);
  if (h.w.kind == QK_KIND_INT) {
    const float centred = (float)code - (float)h.zero(row, g);
    return scale * centred;
  }
  const float factor = scale * h.w.table_scale;
  return factor * (float)h.entry(row, g, code);
}
