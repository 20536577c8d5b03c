// SPDX-License-Identifier: Apache-2.0
// THE description of the packed layout. One layout per weight format, the same for every
// instruction set, so that a packed weight never has to be packed again.
//
// A packed weight is one block: PackedHeader | perm | shared table | panels.
// Sixteen outputs form a half; every output owns a lane of each 16-lane block of codes.
//
//   dword lanes (Lanes::kDword): Int, tables shared by the whole tensor, tables per tile
//     A lane is 4 bytes, a block 64: lane r (bytes 4r..4r+3) is output r. What a 32-bit SIMD lane
//     holds is one output, so unpacked codes feed 4-byte dot products and outputs-in-lanes FMA.
//     A panel is two halves (the last may be one) and interleaves them per unit:
//       panel = groups ascending; group = units ascending x halves | scales | zeros | tile tables
//   row lanes (Lanes::kRow): a table per row or per group
//     A lane is 16 bytes, a block 256 = four 64-byte vectors; vector c, 16-byte lane l is row
//     4l + c. A byte shuffle looks up one table per 16-byte lane, and a 4x4 dword transpose over
//     the four vectors turns looked-up bytes into dword lanes in output order.
//     A panel is one half:
//       panel = row tables | groups ascending; group = group tables | units | scales | zeros
//
// Codes of b bits are split into planes of 8, 4, 2 or 1 bits, low bits first (3 = 2 + 1,
// 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1). In a plane of p bits with lanes of L bytes
//
//       column  k = block * (L * 8 / p) + i * L + j   is bits  i*p .. i*p + p-1  of byte j
//
//   4 bits, dword lane:  byte    0     1     2     3
//                        low    k0    k1    k2    k3      nibble 0
//                        high   k4    k5    k6    k7      nibble 1
//
// A unit is the fewest columns that fill whole blocks in every plane; a unit stores its planes one
// after the other, blocks ascending. Groups are padded to whole units. Padding holds code 0,
// scale 0, zero 0; activations are 0 there.
//
// Scales are kept in the canonical dtype, or F16 where every F32 scale is exactly one. Zeros are U8
// where all are integers 0..255, else F16 where exact, else F32. Both are [16] per half and group.
// Tables: float32 entries for float activations (2^b of them per row or group, 16 in a shared table
// of b <= 4), else u8 = entry + 128 (16 per table where b <= 4, padded with 128); row-lane u8
// tables of b <= 4 bits lie as codes do: row 4l + c at byte 64c + 16l. Tables per tile: two per
// half (outputs 0..7 and 8..15) of exactly 8 entries, F16 for float activations. What follows a
// table (other tables, codes) may be read with it.
#pragma once

#include <stdint.h>

#include "numeric.h"

namespace qkern {

enum class Lanes : int32_t { kDword = 0, kRow = 1 };

constexpr int kHalf = 16;                      // outputs per half
constexpr int kTileOutputsPerTable = 8;        // with tables per tile
constexpr int64_t kSpreadPanels = 32768;       // bytes from which panels are kept apart
constexpr uint32_t kPackedMagic = 0x50574b51;  // "QKWP"
constexpr uint32_t kPackedVersion = 1;

struct PackedHeader {
  uint32_t magic, version;
  int64_t total_bytes;
  int64_t n, k, group;
  int32_t kind, bits, activations, table_per;
  int32_t scale_dtype, scale_stored;  // -1: no scales
  int32_t zero_dtype, zero_stored;    // -1: symmetric
  float table_scale;
  int32_t lanes;
  int64_t perm_offset;   // 0: none
  int64_t table_offset;  // 0: no shared table
  int64_t panels_offset;
  uint8_t reserved[144];
  uint64_t seal;  // of all bytes before it (pack.cpp)
};
static_assert(sizeof(PackedHeader) == 256, "the header is part of the layout");

struct Planes {
  int count;
  int bits[3];
};

static inline Planes planes_of(int bits) {
  Planes p = {0, {0, 0, 0}};
  for (int b = 8; b >= 1; b >>= 1)
    if (bits & b) p.bits[p.count++] = b;
  return p;
}

// Everything that follows from the header, and where the parts lie. Cheap to make per call.
struct Packed {
  PackedHeader h;
  Lanes lanes;
  int lane_bytes;
  int unit;              // columns
  int64_t groups;        // 1 where there is one scale per row and no table per group
  int64_t group_padded;  // columns of a full group, padded
  int64_t last_padded;   // columns of the last group, padded
  int64_t k_padded;
  int64_t halves;
  int64_t panel_halves;  // 2 dword, 1 row
  int64_t panel_count;
  // Bytes per half.
  int64_t head_bytes, group_table_bytes, code_bytes, last_code_bytes, scale_bytes, zero_bytes;
  int64_t tile_table_bytes;
  int64_t group_bytes, last_group_bytes, half_bytes;
  int64_t table_bytes;  // of one table as stored
  const uint8_t* panels;
  const void* table;  // the shared table as stored, or NULL
  const int32_t* perm;

  int64_t group_columns(int64_t g) const { return min64(h.group, h.k - g * h.group); }
  int64_t group_columns_padded(int64_t g) const {
    return g + 1 < groups ? group_padded : last_padded;
  }
  // Halves of panel p.
  int halves_of(int64_t p) const { return (int)min64(panel_halves, halves - p * panel_halves); }
  const uint8_t* panel(int64_t p) const { return panels + p * panel_halves * half_bytes; }
  // The block of group g in a panel of `c` halves; then its codes, scales and zeros.
  const uint8_t* group_block(const uint8_t* panel, int64_t g, int c) const {
    return panel + head_bytes + g * group_bytes * c;
  }
  const uint8_t* codes_of(const uint8_t* block) const { return block + group_table_bytes; }
  const uint8_t* scales_of(const uint8_t* block, int64_t g, int c) const {
    return codes_of(block) + (g + 1 < groups ? code_bytes : last_code_bytes) * c;
  }
  const uint8_t* zeros_of(const uint8_t* block, int64_t g, int c) const {
    return scales_of(block, g, c) + scale_bytes * c;
  }
  const uint8_t* tile_tables_of(const uint8_t* block, int64_t g, int c) const {
    return zeros_of(block, g, c) + zero_bytes * c;
  }
  // The tables of one half in group g as packed_table takes them.
  const uint8_t* half_tables(const uint8_t* panel, int64_t g, int c, int half) const {
    const uint8_t* block = group_block(panel, g, c);
    switch (h.table_per) {
      case QK_TABLE_PER_TENSOR:
        return static_cast<const uint8_t*>(table);
      case QK_TABLE_PER_ROW:
        return panel;
      case QK_TABLE_PER_GROUP:
        return block;
      default:
        return tile_tables_of(block, g, c) + half * tile_table_bytes;
    }
  }
};

// Sets all derived fields but the pointers.
static inline Packed packed_geometry(const PackedHeader& h) {
  Packed w = {};
  w.h = h;
  w.lanes = (Lanes)h.lanes;
  w.lane_bytes = w.lanes == Lanes::kDword ? 4 : 16;
  const Planes planes = planes_of(h.bits);
  w.unit = w.lane_bytes * 8 / planes.bits[planes.count - 1];
  w.groups = ceil_div(h.k, h.group);
  w.group_padded = round_up(h.group, w.unit);
  w.last_padded = round_up(h.k - (w.groups - 1) * h.group, w.unit);
  w.k_padded = (w.groups - 1) * w.group_padded + w.last_padded;
  w.halves = ceil_div(h.n, kHalf);
  w.panel_halves = w.lanes == Lanes::kDword ? 2 : 1;
  w.panel_count = ceil_div(w.halves, w.panel_halves);
  if (h.kind == QK_KIND_TABLE && h.table_per == QK_TABLE_PER_TILE) {
    w.table_bytes = ((int64_t)1 << h.bits) * (h.activations == QK_ACT_FLOAT ? 2 : 1);
    w.tile_table_bytes = kHalf / kTileOutputsPerTable * w.table_bytes;
  } else if (h.kind == QK_KIND_TABLE) {
    const bool exact = h.activations == QK_ACT_FLOAT && w.lanes == Lanes::kRow;
    const int64_t entries = h.bits <= 4 && !exact ? 16 : (int64_t)1 << h.bits;
    w.table_bytes = entries * (h.activations == QK_ACT_FLOAT ? 4 : 1);
    if (h.table_per == QK_TABLE_PER_ROW) w.head_bytes = kHalf * w.table_bytes;
    if (h.table_per == QK_TABLE_PER_GROUP) w.group_table_bytes = kHalf * w.table_bytes;
  }
  w.code_bytes = w.group_padded * kHalf * h.bits / 8;
  w.last_code_bytes = w.last_padded * kHalf * h.bits / 8;
  w.scale_bytes = h.scale_stored < 0 ? 0 : kHalf * dtype_size(h.scale_stored);
  w.zero_bytes = h.zero_stored < 0 ? 0 : kHalf * dtype_size(h.zero_stored);
  w.group_bytes =
      w.group_table_bytes + w.code_bytes + w.scale_bytes + w.zero_bytes + w.tile_table_bytes;
  w.last_group_bytes = w.group_bytes - w.code_bytes + w.last_code_bytes;
  w.half_bytes = w.head_bytes + (w.groups - 1) * w.group_bytes + w.last_group_bytes;
  // Kernels read several panels at once; panels a multiple of 4 KiB apart would share cache sets.
  // Large panels end in a gap, so that they are an odd multiple of 1 KiB apart (mod 2 KiB).
  if (w.half_bytes * w.panel_halves >= kSpreadPanels) {
    const int64_t pitch = 2048 / w.panel_halves;
    w.half_bytes = round_up(w.half_bytes + pitch / 2, pitch) - pitch / 2;
  }
  return w;
}

// Where output r of a half lies inside a block of codes.
static inline int lane_offset(Lanes lanes, int r) {
  return lanes == Lanes::kDword ? 4 * r : (r & 3) * 64 + (r >> 2) * 16;
}

// The value that is subtracted from a stored unsigned code or table byte so that it becomes the
// integer of the contract: 2^(b-1) (symmetric), 0 (with zeros: subtracted as floats), 128 (tables).
static inline int code_offset(const Packed& w) {
  if (w.h.kind == QK_KIND_TABLE) return 128;
  return w.h.zero_stored < 0 ? 1 << (w.h.bits - 1) : 0;
}

// Reads and checks the header of a packed block: a sentence for qk_last_error where it is not one.
// What follows the header is not looked at.
qk_status packed_open(const void* packed, int64_t bytes, Packed* w);

// Codes of columns [k0, k0 + columns) of a group, half `half` of `halves`: one byte each,
// out[r * out_stride + k]. k0 and columns are whole units.
void packed_codes(const Packed& w, const uint8_t* group_codes, int half, int halves, int64_t k0,
                  int64_t columns, uint8_t* out, int64_t out_stride);

// The 2^b entries of the table that row r of a half uses; `tables`: half_tables() of the half.
void packed_table(const Packed& w, const uint8_t* tables, int r, float* entries);

}  // namespace qkern
