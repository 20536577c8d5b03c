// SPDX-License-Identifier: Apache-2.0
// Canonical storage <-> the packed layout (layout.h), bit for bit both ways.

#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>

#include "error.h"
#include "layout.h"
#include "parallel.h"
#include "structs.h"

namespace qkern {
namespace {

bool is_float(qk_dtype d) { return d == QK_F32 || d == QK_F16 || d == QK_BF16; }
bool is_scale(qk_dtype d) { return is_float(d) || d == QK_E8M0 || d == QK_E4M3; }

int64_t table_count(const qk_weight& w, int64_t groups) {
  if (w.table_per == QK_TABLE_PER_TENSOR) return 1;
  if (w.table_per == QK_TABLE_PER_TILE) return ceil_div(w.n, kTileOutputsPerTable) * groups;
  return w.table_per == QK_TABLE_PER_ROW ? w.n : w.n * groups;
}

int64_t effective_group(const qk_weight& w) { return w.group > 0 && w.group < w.k ? w.group : w.k; }

// Kernels index memory with it.
qk_status check_perm(const int32_t* perm, int64_t k) {
  const std::unique_ptr<uint8_t[]> seen(new (std::nothrow) uint8_t[(size_t)ceil_div(k, 8)]());
  if (!seen)
    return fail(QK_OUT_OF_MEMORY, "qk_weight: no memory to check a perm of %lld", (long long)k);
  for (int64_t i = 0; i < k; ++i) {
    const int64_t p = perm[i];
    if (p < 0 || p >= k || (seen[(size_t)p / 8] >> p % 8 & 1))
      return fail(QK_BAD_FORMAT, "perm must hold every column 0..%lld once, entry %lld is %lld",
                  (long long)k - 1, (long long)i, (long long)p);
    seen[(size_t)p / 8] |= (uint8_t)(1 << p % 8);
  }
  return QK_OK;
}

// The caller's description in `w`, checked; of the numbers in its arrays only perm.
qk_status read_weight(const qk_weight* weight, qk_weight* w) {
  if (qk_status s = read_struct("qk_weight", weight, w)) return s;
  if (w->kind != QK_KIND_INT && w->kind != QK_KIND_TABLE)
    return fail(QK_INVALID_ARGUMENT, "qk_weight: kind must be 0 (int) or 1 (table), got %d",
                w->kind);
  if (w->bits < 1 || w->bits > 8)
    return fail(QK_INVALID_ARGUMENT, "qk_weight: bits must be 1..8, got %d", w->bits);
  if (w->activations < QK_ACT_FLOAT || w->activations > QK_ACT_INT8_GROUP)
    return fail(QK_INVALID_ARGUMENT, "qk_weight: activations must be 0, 1 or 2, got %d",
                w->activations);
  if (w->n < 1 || w->k < 1 || w->n > INT64_C(1) << 40 || w->k > INT64_C(1) << 31)
    return fail(QK_INVALID_ARGUMENT, "qk_weight: expected n and k of at least 1, got %lld x %lld",
                (long long)w->n, (long long)w->k);
  if (w->group < 0)
    return fail(QK_INVALID_ARGUMENT, "qk_weight: group must not be negative, got %lld",
                (long long)w->group);
  if (!w->codes) return fail(QK_INVALID_ARGUMENT, "qk_weight: codes must not be NULL");
  if (w->codes_stride_bytes < ceil_div(w->k * w->bits, 8))
    return fail(QK_INVALID_ARGUMENT, "qk_weight: a row of codes needs %lld bytes, stride is %lld",
                (long long)ceil_div(w->k * w->bits, 8), (long long)w->codes_stride_bytes);
  if (w->scales && !is_scale(w->scale_dtype))
    return fail(QK_INVALID_ARGUMENT, "qk_weight: dtype %d cannot hold scales", w->scale_dtype);
  if (w->zeros && !is_float(w->zero_dtype) && w->zero_dtype != QK_U8)
    return fail(QK_INVALID_ARGUMENT, "qk_weight: dtype %d cannot hold zeros", w->zero_dtype);
  if (w->kind == QK_KIND_TABLE) {
    if (!w->codebook) return fail(QK_INVALID_ARGUMENT, "qk_weight: a table needs a codebook");
    if (w->zeros) return fail(QK_INVALID_ARGUMENT, "qk_weight: a table has no zeros");
    if (w->table_per < QK_TABLE_PER_TENSOR || w->table_per > QK_TABLE_PER_TILE)
      return fail(QK_INVALID_ARGUMENT, "qk_weight: table_per must be 0, 1, 2 or 3, got %d",
                  w->table_per);
    if (w->table_per == QK_TABLE_PER_TILE && w->bits != 3)
      return fail(QK_INVALID_ARGUMENT, "qk_weight: a table per tile has codes of 3 bits, got %d",
                  w->bits);
    if (!std::isfinite(w->table_scale))
      return fail(QK_BAD_FORMAT, "table_scale must be finite, got %g", (double)w->table_scale);
  }
  if (w->activations == QK_ACT_INT8_GROUP && effective_group(*w) < w->k &&
      effective_group(*w) > 65536)
    return fail(QK_UNSUPPORTED,
                "int8_group activations need groups of at most 65536 columns, got %lld",
                (long long)effective_group(*w));
  return w->perm ? check_perm(w->perm, w->k) : QK_OK;
}

qk_status check_values(const qk_weight& w, int64_t groups) {
  for (int64_t r = 0; r < w.n; ++r)
    for (int64_t g = 0; g < groups; ++g) {
      if (w.scales && !std::isfinite(load_float(w.scales, w.scale_dtype, r * w.scales_stride + g)))
        return fail(QK_BAD_FORMAT, "scale of row %lld, group %lld is not finite", (long long)r,
                    (long long)g);
      if (w.zeros && !std::isfinite(load_float(w.zeros, w.zero_dtype, r * w.zeros_stride + g)))
        return fail(QK_BAD_FORMAT, "zero point of row %lld, group %lld is not finite", (long long)r,
                    (long long)g);
    }
  if (w.kind == QK_KIND_TABLE) {
    const int64_t entries = table_count(w, groups) << w.bits;
    const bool integers = w.activations != QK_ACT_FLOAT;
    const bool halves = !integers && w.table_per == QK_TABLE_PER_TILE;
    for (int64_t i = 0; i < entries; ++i) {
      const float v = w.codebook[i];
      if (!std::isfinite(v))
        return fail(QK_BAD_FORMAT, "codebook entry %lld is not finite", (long long)i);
      if (integers && (v != std::rint(v) || v < -128.f || v > 127.f))
        return fail(QK_BAD_FORMAT,
                    "with int8 activations codebook entries are integers in -128..127, "
                    "entry %lld is %g",
                    (long long)i, (double)v);
      if (halves && float_bits(f16_to_float(float_to_f16(v))) != float_bits(v))
        return fail(QK_BAD_FORMAT,
                    "entries of a table per tile must be exact in float16, as float8 (e4m3) is; "
                    "entry %lld is %g",
                    (long long)i, (double)v);
    }
  }
  return QK_OK;
}

// The smallest dtype in the list of layout.h that holds all values exactly.
qk_dtype stored_scale_dtype(const qk_weight& w, int64_t groups) {
  if (w.scale_dtype != QK_F32) return w.scale_dtype;
  for (int64_t r = 0; r < w.n; ++r)
    for (int64_t g = 0; g < groups; ++g) {
      const float v = load_float(w.scales, QK_F32, r * w.scales_stride + g);
      if (float_bits(f16_to_float(float_to_f16(v))) != float_bits(v)) return QK_F32;
    }
  return QK_F16;
}

qk_dtype stored_zero_dtype(const qk_weight& w, int64_t groups) {
  bool byte = true, half = true;
  for (int64_t r = 0; r < w.n && (byte || half); ++r)
    for (int64_t g = 0; g < groups; ++g) {
      const float v = load_float(w.zeros, w.zero_dtype, r * w.zeros_stride + g);
      byte = byte && v >= 0.f && v <= 255.f && float_bits((float)(uint8_t)v) == float_bits(v);
      half = half && float_bits(f16_to_float(float_to_f16(v))) == float_bits(v);
    }
  return byte ? QK_U8 : half ? QK_F16 : QK_F32;
}

// A number that changes with any change of the bytes before `seal`: every step is a bijection of
// the word it takes in, so that no change of a single word goes unseen, and all sizes and offsets
// of a header that fits its seal are those that qk_pack wrote. Four chains: about 10 ns per call.
uint64_t header_seal(const PackedHeader& h) {
  constexpr uint64_t kOdd = UINT64_C(0x9e3779b97f4a7c15);
  constexpr int kWords = offsetof(PackedHeader, seal) / 8;
  uint64_t words[kWords], chains[4] = {1, 2, 3, 4}, seal = 0;
  std::memcpy(words, &h, sizeof words);
  for (int i = 0; i < kWords; ++i) {
    const uint64_t mixed = (chains[i & 3] ^ words[i]) * kOdd;
    chains[i & 3] = mixed ^ mixed >> 32;  // high bits reach the low ones of the next product
  }
  for (const uint64_t chain : chains) {
    seal = (seal ^ chain) * kOdd;
    seal ^= seal >> 32;
  }
  return seal;
}

PackedHeader make_header(const qk_weight& w) {
  PackedHeader h = {};
  h.magic = kPackedMagic;
  h.version = kPackedVersion;
  h.n = w.n;
  h.k = w.k;
  h.group = effective_group(w);
  h.kind = w.kind;
  h.bits = w.bits;
  h.activations = w.activations;
  const bool table = w.kind == QK_KIND_TABLE;
  h.table_per = table ? w.table_per : QK_TABLE_PER_TENSOR;
  h.table_scale = table ? w.table_scale : 1.f;
  const bool of_rows =
      table && (w.table_per == QK_TABLE_PER_ROW || w.table_per == QK_TABLE_PER_GROUP);
  h.lanes = (int32_t)(of_rows ? Lanes::kRow : Lanes::kDword);
  const int64_t groups = ceil_div(h.k, h.group);
  h.scale_dtype = w.scales ? w.scale_dtype : -1;
  h.scale_stored = w.scales ? stored_scale_dtype(w, groups) : -1;
  h.zero_dtype = w.zeros ? w.zero_dtype : -1;
  h.zero_stored = w.zeros ? stored_zero_dtype(w, groups) : -1;
  const Packed p = packed_geometry(h);
  int64_t at = sizeof(PackedHeader);
  if (w.perm) {
    h.perm_offset = at;
    at = round_up(at + 4 * w.k, 64);
  }
  if (table && w.table_per == QK_TABLE_PER_TENSOR) {
    h.table_offset = at;
    at = round_up(at + p.table_bytes, 64);
  }
  h.panels_offset = at;
  // 64 bytes more: a vector load that starts at the last scale may read a whole register.
  h.total_bytes = round_up(at + p.halves * p.half_bytes, 64) + 64;
  h.seal = header_seal(h);
  return h;
}

void read_stream(const uint8_t* stream, int bits, int64_t k0, int64_t columns, uint8_t* codes) {
  const unsigned mask = (1u << bits) - 1;
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t bit = (k0 + i) * bits;
    unsigned word = stream[bit >> 3];
    if ((bit & 7) + bits > 8) word |= (unsigned)stream[(bit >> 3) + 1] << 8;
    codes[i] = (uint8_t)((word >> (bit & 7)) & mask);
  }
}

void write_stream(uint8_t* stream, int bits, int64_t k0, int64_t columns, const uint8_t* codes) {
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t bit = (k0 + i) * bits;
    const unsigned word = (unsigned)codes[i] << (bit & 7);
    stream[bit >> 3] |= (uint8_t)word;
    if ((bit & 7) + bits > 8) stream[(bit >> 3) + 1] |= (uint8_t)(word >> 8);
  }
}

// Walks the bytes of one lane: fn(byte pointer, first column, plane bits, shift of the plane).
template <class Byte, class Fn>
void for_lane_bytes(const Packed& w, Byte* codes, int half, int halves, int r, int64_t k0,
                    int64_t columns, const Fn& fn) {
  const Planes planes = planes_of(w.h.bits);
  const int block_bytes = kHalf * w.lane_bytes, offset = lane_offset(w.lanes, r);
  const int64_t unit_bytes = (int64_t)w.unit * kHalf * w.h.bits / 8;
  for (int64_t u = k0 / w.unit; u < (k0 + columns) / w.unit; ++u) {
    Byte* at = codes + (u * halves + half) * unit_bytes + offset;
    for (int p = 0, shift = 0; p < planes.count; shift += planes.bits[p], ++p) {
      const int block_columns = w.lane_bytes * 8 / planes.bits[p];
      for (int b = 0; b < w.unit; b += block_columns, at += block_bytes)
        for (int j = 0; j < w.lane_bytes; ++j)
          fn(at + j, u * w.unit + b + j, planes.bits[p], shift);
    }
  }
}

// Table r of the tables of a half (a row's, a tile's), or the shared one.
void store_table(const Packed& w, const float* entries, int r, uint8_t* tables) {
  const int count = 1 << w.h.bits;
  if (w.tile_table_bytes && w.h.activations == QK_ACT_FLOAT) {
    for (int i = 0; i < count; ++i) store_float(tables + r * w.table_bytes, QK_F16, i, entries[i]);
    return;
  }
  if (w.h.activations == QK_ACT_FLOAT) {
    float* out = reinterpret_cast<float*>(tables) + r * (w.table_bytes / 4);
    for (int64_t i = 0; i < w.table_bytes / 4; ++i) out[i] = i < count ? entries[i] : 0.f;
    return;
  }
  const bool shuffled = w.lanes == Lanes::kRow && w.h.bits <= 4;
  uint8_t* out = tables + (shuffled ? lane_offset(Lanes::kRow, r) : r * w.table_bytes);
  for (int64_t i = 0; i < w.table_bytes; ++i)
    out[i] = (uint8_t)(128 + (i < count ? (int)entries[i] : 0));
}

// Copies one group's worth of scales or zeros of a half, converting to the stored dtype.
void store_values(uint8_t* out, qk_dtype stored, const void* values, qk_dtype dtype, int64_t stride,
                  int64_t row0, int rows, int64_t g) {
  const int size = dtype_size(stored);
  std::memset(out, 0, (size_t)(kHalf * size));
  for (int r = 0; r < rows; ++r) {
    const int64_t i = (row0 + r) * stride + g;
    if (stored == dtype)
      std::memcpy(out + r * size, (const uint8_t*)values + i * size, (size_t)size);
    else if (stored == QK_U8)
      out[r] = (uint8_t)load_float(values, dtype, i);
    else
      store_float(out, stored, r, load_float(values, dtype, i));
  }
}

void load_values(const uint8_t* in, qk_dtype stored, void* values, qk_dtype dtype, int64_t stride,
                 int64_t row0, int rows, int64_t g) {
  const int size = dtype_size(dtype);
  for (int r = 0; r < rows; ++r) {
    const int64_t i = (row0 + r) * stride + g;
    if (stored == dtype)
      std::memcpy((uint8_t*)values + i * size, in + r * size, (size_t)size);
    else
      store_float(values, dtype, i, load_float(in, stored, r));
  }
}

void pack_half(const qk_weight& src, const Packed& w, uint8_t* panels, int64_t half_index,
               uint8_t* row_codes) {
  const int64_t p = half_index / w.panel_halves;
  const int c = w.halves_of(p), half = (int)(half_index % w.panel_halves);
  uint8_t* panel = panels + p * w.panel_halves * w.half_bytes;
  const int64_t row0 = half_index * kHalf;
  const int rows = (int)min64(kHalf, w.h.n - row0);
  const int64_t entries = (int64_t)1 << w.h.bits;
  if (w.head_bytes) {
    std::memset(panel, w.h.activations == QK_ACT_FLOAT ? 0 : 128, (size_t)w.head_bytes);
    for (int r = 0; r < rows; ++r) store_table(w, src.codebook + (row0 + r) * entries, r, panel);
  }
  for (int64_t g = 0; g < w.groups; ++g) {
    uint8_t* block = const_cast<uint8_t*>(w.group_block(panel, g, c));
    if (w.group_table_bytes) {
      std::memset(block, w.h.activations == QK_ACT_FLOAT ? 0 : 128, (size_t)w.group_table_bytes);
      for (int r = 0; r < rows; ++r)
        store_table(w, src.codebook + ((row0 + r) * w.groups + g) * entries, r, block);
    }
    uint8_t* codes = const_cast<uint8_t*>(w.codes_of(block));
    const int64_t columns = w.group_columns(g), padded = w.group_columns_padded(g);
    for (int r = 0; r < kHalf; ++r) {
      std::memset(row_codes, 0, (size_t)padded);
      if (r < rows)
        read_stream(src.codes + (row0 + r) * src.codes_stride_bytes, w.h.bits, g * w.h.group,
                    columns, row_codes);
      const int lane = w.lane_bytes;
      for_lane_bytes(w, codes, half, c, r, 0, padded,
                     [&](uint8_t* byte, int64_t k, int bits, int shift) {
                       unsigned v = 0;
                       const unsigned mask = (1u << bits) - 1;
                       for (int i = 0; i * bits < 8; ++i)
                         v |= ((row_codes[k + i * lane] >> shift) & mask) << (i * bits);
                       *byte = (uint8_t)v;
                     });
    }
    if (w.scale_bytes)
      store_values(const_cast<uint8_t*>(w.scales_of(block, g, c)) + half * w.scale_bytes,
                   w.h.scale_stored, src.scales, src.scale_dtype, src.scales_stride, row0, rows, g);
    if (w.zero_bytes)
      store_values(const_cast<uint8_t*>(w.zeros_of(block, g, c)) + half * w.zero_bytes,
                   w.h.zero_stored, src.zeros, src.zero_dtype, src.zeros_stride, row0, rows, g);
    if (w.tile_table_bytes) {
      uint8_t* tables = const_cast<uint8_t*>(w.half_tables(panel, g, c, half));
      std::memset(tables, w.h.activations == QK_ACT_FLOAT ? 0 : 128, (size_t)w.tile_table_bytes);
      for (int t = 0; t * kTileOutputsPerTable < rows; ++t)
        store_table(w, src.codebook + ((row0 / kTileOutputsPerTable + t) * w.groups + g) * entries,
                    t, tables);
    }
  }
}

void unpack_half(const Packed& w, const qk_weight_out& out, int64_t half_index,
                 uint8_t* half_codes) {
  const int64_t p = half_index / w.panel_halves;
  const int c = w.halves_of(p), half = (int)(half_index % w.panel_halves);
  const uint8_t* panel = w.panel(p);
  const int64_t row0 = half_index * kHalf, row_bytes = ceil_div(w.h.k * w.h.bits, 8);
  const int rows = (int)min64(kHalf, w.h.n - row0);
  const int64_t entries = (int64_t)1 << w.h.bits;
  if (out.codes) std::memset(out.codes + row0 * row_bytes, 0, (size_t)(rows * row_bytes));
  if (out.codebook && w.head_bytes)
    for (int r = 0; r < rows; ++r) packed_table(w, panel, r, out.codebook + (row0 + r) * entries);
  for (int64_t g = 0; g < w.groups; ++g) {
    const uint8_t* block = w.group_block(panel, g, c);
    if (out.codebook && w.group_table_bytes)
      for (int r = 0; r < rows; ++r)
        packed_table(w, block, r, out.codebook + ((row0 + r) * w.groups + g) * entries);
    if (out.codebook && w.tile_table_bytes)
      for (int r = 0; r < rows; r += kTileOutputsPerTable)
        packed_table(w, w.half_tables(panel, g, c, half), r,
                     out.codebook + ((row0 + r) / kTileOutputsPerTable * w.groups + g) * entries);
    if (out.codes) {
      const int64_t padded = w.group_columns_padded(g);
      packed_codes(w, w.codes_of(block), half, c, 0, padded, half_codes, padded);
      for (int r = 0; r < rows; ++r)
        write_stream(out.codes + (row0 + r) * row_bytes, w.h.bits, g * w.h.group,
                     w.group_columns(g), half_codes + r * padded);
    }
    if (out.scales && w.scale_bytes)
      load_values(w.scales_of(block, g, c) + half * w.scale_bytes, w.h.scale_stored, out.scales,
                  w.h.scale_dtype, w.groups, row0, rows, g);
    if (out.zeros && w.zero_bytes) {
      const uint8_t* zeros = w.zeros_of(block, g, c) + half * w.zero_bytes;
      load_values(zeros, w.h.zero_stored, out.zeros, w.h.zero_dtype, w.groups, row0, rows, g);
    }
  }
}

}  // namespace

void packed_codes(const Packed& w, const uint8_t* group_codes, int half, int halves, int64_t k0,
                  int64_t columns, uint8_t* out, int64_t out_stride) {
  for (int r = 0; r < kHalf; ++r) {
    uint8_t* row = out + r * out_stride;
    std::memset(row, 0, (size_t)columns);
    const int lane = w.lane_bytes;
    for_lane_bytes(w, group_codes, half, halves, r, k0, columns,
                   [&](const uint8_t* byte, int64_t k, int bits, int shift) {
                     const unsigned mask = (1u << bits) - 1;
                     for (int i = 0; i * bits < 8; ++i)
                       row[k - k0 + i * lane] |= (uint8_t)(((*byte >> (i * bits)) & mask) << shift);
                   });
  }
}

void packed_table(const Packed& w, const uint8_t* tables, int r, float* entries) {
  const int count = 1 << w.h.bits;
  if (w.h.table_per == QK_TABLE_PER_TENSOR) {
    tables = static_cast<const uint8_t*>(w.table);
    r = 0;
  }
  if (w.tile_table_bytes) {
    r /= kTileOutputsPerTable;
    if (w.h.activations == QK_ACT_FLOAT) {
      for (int i = 0; i < count; ++i)
        entries[i] = load_float(tables + r * w.table_bytes, QK_F16, i);
      return;
    }
  }
  if (w.h.activations == QK_ACT_FLOAT) {
    std::memcpy(entries, tables + r * w.table_bytes, sizeof(float) * (size_t)count);
    return;
  }
  const bool shuffled = w.lanes == Lanes::kRow && w.h.bits <= 4;
  const uint8_t* t = tables + (shuffled ? lane_offset(Lanes::kRow, r) : r * w.table_bytes);
  for (int i = 0; i < count; ++i) entries[i] = (float)(t[i] - 128);
}

qk_status packed_open(const void* packed, int64_t bytes, Packed* w) {
  if (!packed || bytes < (int64_t)sizeof(PackedHeader))
    return fail(QK_INVALID_ARGUMENT, "a packed weight has at least %zu bytes, got %lld",
                sizeof(PackedHeader), (long long)bytes);
  if (reinterpret_cast<uintptr_t>(packed) % 64)
    return fail(QK_INVALID_ARGUMENT, "a packed weight begins at a multiple of 64, got %p", packed);
  PackedHeader h;
  std::memcpy(&h, packed, sizeof h);
  if (h.magic != kPackedMagic || h.version != kPackedVersion)
    return fail(QK_INVALID_ARGUMENT,
                "this is not a weight packed by this version of qkern; pack it again from "
                "canonical storage");
  if (h.seal != header_seal(h))
    return fail(QK_INVALID_ARGUMENT,
                "the header of this packed weight was overwritten; pack it again from canonical "
                "storage");
  if (h.total_bytes > bytes)
    return fail(QK_INVALID_ARGUMENT, "the packed weight has %lld bytes, the buffer only %lld",
                (long long)h.total_bytes, (long long)bytes);
  *w = packed_geometry(h);
  const uint8_t* base = static_cast<const uint8_t*>(packed);
  w->panels = base + h.panels_offset;
  w->table = h.table_offset ? base + h.table_offset : nullptr;
  w->perm = h.perm_offset ? reinterpret_cast<const int32_t*>(base + h.perm_offset) : nullptr;
  return QK_OK;
}

}  // namespace qkern

using namespace qkern;

extern "C" {

qk_status qk_packed_bytes(const qk_weight* weight, int64_t* bytes) {
  qk_weight known;
  if (qk_status s = read_weight(weight, &known)) return s;
  if (!bytes) return fail(QK_INVALID_ARGUMENT, "qk_packed_bytes: bytes must not be NULL");
  *bytes = make_header(known).total_bytes;
  return QK_OK;
}

qk_status qk_pack(const qk_weight* weight, void* packed, int64_t bytes) {
  qk_weight known;
  if (qk_status s = read_weight(weight, &known)) return s;
  weight = &known;
  const PackedHeader h = make_header(known);
  if (!packed || bytes < h.total_bytes || reinterpret_cast<uintptr_t>(packed) % 64)
    return fail(QK_INVALID_ARGUMENT,
                "qk_pack: this weight needs %lld bytes at a multiple of 64, got %lld at %p",
                (long long)h.total_bytes, (long long)bytes, packed);
  const Packed w = packed_geometry(h);
  if (qk_status s = check_values(*weight, w.groups)) return s;
  uint8_t* base = static_cast<uint8_t*>(packed);
  const int64_t largest = max64(w.group_padded, w.last_padded), tasks = min64(w.halves, 64);
  uint8_t* scratch = new (std::nothrow) uint8_t[(size_t)(tasks * largest)];
  if (!scratch)
    return fail(QK_OUT_OF_MEMORY, "qk_pack: no memory for %lld bytes of scratch",
                (long long)(tasks * largest));
  std::memset(base, 0, (size_t)h.panels_offset);
  std::memcpy(base, &h, sizeof h);
  if (weight->perm)
    std::memcpy(base + h.perm_offset, weight->perm, sizeof(int32_t) * (size_t)weight->k);
  if (h.table_offset) store_table(w, weight->codebook, 0, base + h.table_offset);
  uint8_t* panels = base + h.panels_offset;
  parallel_for(nullptr, tasks, [&](int64_t t) {
    for (int64_t i = w.halves * t / tasks; i < w.halves * (t + 1) / tasks; ++i)
      pack_half(*weight, w, panels, i, scratch + t * largest);
  });
  std::memset(panels + w.halves * w.half_bytes, 0,
              (size_t)(h.total_bytes - h.panels_offset - w.halves * w.half_bytes));
  delete[] scratch;
  return QK_OK;
}

qk_status qk_packed_describe(const void* packed, int64_t bytes, qk_weight* weight) {
  Packed w = {};
  if (qk_status s = packed_open(packed, bytes, &w)) return s;
  if (qk_status s = check_struct("qk_weight", weight)) return s;
  qk_weight known = {};
  known.kind = w.h.kind;
  known.bits = w.h.bits;
  known.activations = w.h.activations;
  known.n = w.h.n;
  known.k = w.h.k;
  known.group = w.h.group;
  known.codes = w.panels;
  known.codes_stride_bytes = ceil_div(w.h.k * w.h.bits, 8);
  known.scales = w.h.scale_dtype < 0 ? nullptr : w.panels;
  known.scale_dtype = w.h.scale_dtype < 0 ? QK_F32 : w.h.scale_dtype;
  known.scales_stride = w.groups;
  known.zeros = w.h.zero_dtype < 0 ? nullptr : w.panels;
  known.zero_dtype = w.h.zero_dtype < 0 ? QK_F32 : w.h.zero_dtype;
  known.zeros_stride = w.groups;
  known.codebook = w.h.kind == QK_KIND_TABLE ? reinterpret_cast<const float*>(w.panels) : nullptr;
  known.table_per = w.h.table_per;
  known.table_scale = w.h.table_scale;
  known.perm = w.perm;
  write_struct(known, weight);
  return QK_OK;
}

qk_status qk_unpack(const void* packed, int64_t bytes, const qk_weight_out* out) {
  Packed w = {};
  if (qk_status s = packed_open(packed, bytes, &w)) return s;
  qk_weight_out known;
  if (qk_status s = read_struct("qk_weight_out", out, &known)) return s;
  const int64_t largest = kHalf * max64(w.group_padded, w.last_padded);
  const int64_t tasks = min64(w.halves, 64);
  uint8_t* scratch = new (std::nothrow) uint8_t[(size_t)(tasks * largest)];
  if (!scratch)
    return fail(QK_OUT_OF_MEMORY, "qk_unpack: no memory for %lld bytes of scratch",
                (long long)(tasks * largest));
  if (known.perm && w.perm) std::memcpy(known.perm, w.perm, sizeof(int32_t) * (size_t)w.h.k);
  if (known.codebook && w.table) packed_table(w, nullptr, 0, known.codebook);
  parallel_for(nullptr, tasks, [&](int64_t t) {
    for (int64_t i = w.halves * t / tasks; i < w.halves * (t + 1) / tasks; ++i)
      unpack_half(w, known, i, scratch + t * largest);
  });
  delete[] scratch;
  return QK_OK;
}
}
