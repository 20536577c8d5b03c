// SPDX-License-Identifier: Apache-2.0
// THE description of the packed layout on CUDA devices, version QK_CUDA_LAYOUT_VERSION. One layout
// per format serves every M. Pure functions for host and device; the kernels, the packer and the
// tests all call these.
//
//   packed = codes | scales | zeros | table | perm | block tables | factors
//                                                      (each part starts at a multiple of 128)
//
// Codes. Rows are padded to tiles of 64, and columns so that every group starts at a multiple of
// `unit` (16; 32 with int8 activations; 64 with a table per group or tile, so that a block has one
// table per row) and the total is a multiple of 64. A block is 64 rows x
// 64 columns and belongs to one warp:
//
//   codes[row tile][column block] = `bits` vectors x 32 lanes x 16 bytes
//
// A warp thus reads a block with `bits` fully used 16-byte loads, and a lane holds precisely the
// codes that it feeds to the matrix unit: in the A operand (16 x 16, or 16 x 32 with int8) of
// mma.sync, lane = 4 g + t owns rows g and g + 8. With row = 16 i + 8 h + g and column =
//
//   16 j + 2 t + (s & 1) + 8 (s >> 1)     float activations: m16n8k16, step j
//   16 j + 4 t + s                        int8 activations:  m16n8k32, step j >> 1, half j & 1
//
// a lane's codes have indices i = 0..3 (16-row tile), h = 0..1, j = 0..3, s = 0..3. Where they lie
// depends on what unpacks them:
//
//   split     two codes that share a register lie 16 bits apart: one AND-OR makes both
//     4 bits  vector j, word i:           nibble 4 (s & 1) + 2 (s >> 1) + h
//     8 bits  vector 2 j + (i >> 1), word 2 (i & 1) + (s >> 1):   byte 2 (s & 1) + h
//   adjacent  the four codes of a row lie in four neighbouring nibbles, which is what selects bytes
//             from tables; two neighbours index a table of pairs
//     4 bits  vector j, word i:           nibble 4 h + s
//     2 bits  vector j >> 1, word i:      nibble 4 h + 2 (s & 1) + (s >> 1), bits 2 (j & 1) and up,
//             so that codes that share a register lie a byte apart
//     3 bits  vector j >> 1, word i:      nibble 4 h + s, bits 2 (j & 1) and up: the low two bits;
//             the high bit in vector 2, word i: nibble 4 h + s, bit j
//   byte      four codes of a row make the four bytes of an int8 register
//     8 bits  vector 4 (j >> 1) + i, word 2 (j & 1) + h:   byte s
//     4 bits  vector 2 (j >> 1) + (i >> 1), word 2 (i & 1) + (j & 1):   byte s, nibble h
//   lookup    tables with int8 activations: places as adjacent, of 2 bits as of 3, columns as byte
//
// Scales and zeros: [row tile][group][64], row 16 i + 8 h + g at place 8 g + 2 i + h, so that a
// lane's eight rows are one 16-byte load. Scales are kept as they come; E8M0 becomes BF16 and E4M3
// becomes F16 (both exact). Zeros: U8 becomes F16 (exact), others as they come.
// Table: float32 as in canonical storage. Perm: int32 [k].
// Block tables, with a table per group or tile: [row tile][group] as linear kernels read them
// (convert_tables.cuh), rounded to float16, then once more to bfloat16; bytes with int8
// activations. Factors, with float activations and a table per group: float32 in the places of
// scales, scale times the power of two by which the rounded table was divided. Padding holds code 0
// and scale 0; activations are 0 in padded columns.
#pragma once

#include "bits.cuh"
#include "qkern/qkern_cuda.h"

namespace qkern {
namespace cuda {

constexpr int kTileRows = 64;
constexpr int kBlockColumns = 64;
constexpr int kVectorBytes = 32 * 16;  // one vector of all lanes
constexpr int kTableRows = 8;          // of a table per tile

enum class Order : int32_t { kSplit = 0, kAdjacent = 1, kByte = 2, kLookup = 3 };

template <class T>
QK_HD T div_up(T a, T b) {
  return (a + b - 1) / b;
}

// Which code of a lane: see above.
struct Slot {
  int i, h, j, s;
};

// Where (part of) a code lies among a lane's words: bits [shift, shift + width) of the word are
// bits [low, low + width) of the code.
struct Place {
  int vector, word, shift, width, low;
};

QK_HD constexpr int place_count(int bits) { return bits == 3 ? 2 : 1; }

QK_HD constexpr Place place_of(Order order, int bits, Slot c, int part) {
  if (order == Order::kSplit)
    return bits == 4 ? Place{c.j, c.i, 4 * (4 * (c.s & 1) + 2 * (c.s >> 1) + c.h), 4, 0}
                     : Place{2 * c.j + (c.i >> 1), 2 * (c.i & 1) + (c.s >> 1),
                             8 * (2 * (c.s & 1) + c.h), 8, 0};
  if (order == Order::kByte)
    return bits == 8 ? Place{4 * (c.j >> 1) + c.i, 2 * (c.j & 1) + c.h, 8 * c.s, 8, 0}
                     : Place{2 * (c.j >> 1) + (c.i >> 1), 2 * (c.i & 1) + (c.j & 1),
                             8 * c.s + 4 * c.h, 4, 0};
  const bool spread = order == Order::kAdjacent && bits == 2;
  const int nibble = 4 * c.h + (spread ? 2 * (c.s & 1) + (c.s >> 1) : c.s);
  if (bits == 4) return Place{c.j, c.i, 4 * nibble, 4, 0};
  return part == 0 ? Place{c.j >> 1, c.i, 4 * nibble + 2 * (c.j & 1), 2, 0}
                   : Place{2, c.i, 4 * nibble + c.j, 1, 2};
}

// The inverse: which bit of which code a bit of a lane's words is.
struct SlotBit {
  Slot slot;
  int bit;
};

QK_HD SlotBit slot_of(Order order, int bits, int vector, int word, int bit) {
  const int nibble = bit >> 2, byte = bit >> 3;
  if (order == Order::kSplit) {
    if (bits == 4)
      return {{word, nibble & 1, vector, 2 * (nibble >> 1 & 1) + (nibble >> 2)}, bit & 3};
    return {{2 * (vector & 1) + (word >> 1), byte & 1, vector >> 1, 2 * (word & 1) + (byte >> 1)},
            bit & 7};
  }
  if (order == Order::kByte) {
    if (bits == 8) return {{vector & 3, word & 1, 2 * (vector >> 2) + (word >> 1), byte}, bit & 7};
    return {{2 * (vector & 1) + (word >> 1), nibble & 1, 2 * (vector >> 1) + (word & 1), byte},
            bit & 3};
  }
  const bool spread = order == Order::kAdjacent && bits == 2;
  const int h = nibble >> 2, s = spread ? 2 * (nibble & 1) + (nibble >> 1 & 1) : nibble & 3;
  if (bits == 4) return {{word, h, vector, s}, bit & 3};
  if (vector == 2) return {{word, h, bit & 3, s}, 2};
  return {{word, h, 2 * vector + (bit >> 1 & 1), s}, bit & 1};
}

// Rows and columns of a block.
QK_HD int block_row(Slot c, int lane) { return 16 * c.i + 8 * c.h + (lane >> 2); }
QK_HD constexpr bool byte_columns(Order order) {
  return order == Order::kByte || order == Order::kLookup;
}
QK_HD int block_column(Order order, Slot c, int lane) {
  const int t = lane & 3;
  return byte_columns(order) ? 16 * c.j + 4 * t + c.s
                             : 16 * c.j + 2 * t + (c.s & 1) + 8 * (c.s >> 1);
}
QK_HD Slot slot_at(Order order, int row, int column, int* lane) {
  const int in_step = column & 15;
  const int t = byte_columns(order) ? in_step >> 2 : (in_step & 7) >> 1;
  const int s = byte_columns(order) ? in_step & 3 : (in_step & 1) + 2 * (in_step >> 3);
  *lane = 4 * (row & 7) + t;
  return {row >> 4, row >> 3 & 1, column >> 4, s};
}

// Place of a row's scale within the 64 of a tile and group, and back.
QK_HD int scale_place(int row) { return 8 * (row & 7) + (row >> 3); }
QK_HD int scale_row(int place) { return 8 * (place & 7) + (place >> 3); }

// Block tables: where byte `index` (low bytes of all entries, then high ones) of a table of
// `table_bytes` lies within those of a row tile and group. [r][part][8], parts of at most 16 bytes,
// for row 8 r + g; with `shared` tables, one per 8 rows, [r].
QK_HD constexpr int table_byte(int table_bytes, int r, int g, bool shared, int index) {
  const int part = table_bytes < 16 ? table_bytes : 16;
  return shared ? r * table_bytes + index
                : (r * (table_bytes / part) + index / part) * 8 * part + g * part + index % part;
}

struct Layout {
  int64_t n, k, group;
  int kind, bits, activations, table_per;
  Order order;
  int unit;              // columns to which groups are padded
  int64_t groups;        // scales (or tables) per row
  int64_t group_padded;  // k_padded where there is one group
  int64_t k_padded, k_blocks, row_tiles;
  qk_dtype scale_dtype, scale_stored;  // -1: none
  qk_dtype zero_dtype, zero_stored;
  bool perm;
  int64_t block_bytes;
  int64_t block_table_bytes;  // of a row tile and group, in one type; 0: no block tables
  bool factors;
  int64_t codes_offset, scales_offset, zeros_offset, table_offset, perm_offset;
  int64_t block_tables_offset[2];  // float16 (or bytes), bfloat16
  int64_t factors_offset, total_bytes;

  QK_HD bool bytes() const { return activations != QK_ACT_FLOAT; }
  QK_HD bool shared_tables() const { return table_per == QK_TABLE_PER_TILE; }

  // Column of the weight to padded column, and back: -1 for padding. Both are below 2^31, and
  // divisions of 32 bits are short, where those of 64 are calls.
  QK_HD int64_t padded_column(int64_t column) const {
    if (groups == 1) return column;
    const uint32_t c = (uint32_t)column, g = c / (uint32_t)group;
    return g * group_padded + (c - g * (uint32_t)group);
  }
  QK_HD int64_t column_of(int64_t padded) const {
    if (groups == 1) return padded < k ? padded : -1;
    const uint32_t g = (uint32_t)padded / (uint32_t)group_padded;
    const int64_t offset = padded - g * group_padded, column = g * group + offset;
    return offset < group && column < k ? column : -1;
  }
  // Byte (from the start of the packed weight) and shift of a code part.
  QK_HD int64_t code_byte(int64_t row, int64_t padded, int part, int* shift, int* width,
                          int* low) const {
    int lane;
    const Slot slot = slot_at(order, (int)(row % kTileRows), (int)(padded % kBlockColumns), &lane);
    const Place p = place_of(order, bits, slot, part);
    const int64_t block = row / kTileRows * k_blocks + padded / kBlockColumns;
    *shift = p.shift & 7;
    *width = p.width;
    *low = p.low;
    return codes_offset + block * block_bytes + p.vector * kVectorBytes + lane * 16 + p.word * 4 +
           (p.shift >> 3);
  }
  QK_HD int code(const uint8_t* packed, int64_t row, int64_t padded) const {
    int value = 0;
    for (int part = 0; part < place_count(bits); ++part) {
      int shift, width, low;
      const int64_t byte = code_byte(row, padded, part, &shift, &width, &low);
      value |= (packed[byte] >> shift & ((1 << width) - 1)) << low;
    }
    return value;
  }
  // Element of the scales or zeros.
  QK_HD int64_t scale_index(int64_t row, int64_t g) const {
    return (row / kTileRows * groups + g) * kTileRows + scale_place((int)(row % kTileRows));
  }
  // First entry of the table of a row and group.
  QK_HD int64_t table_index(int64_t row, int64_t g) const {
    const int64_t table = table_per == QK_TABLE_PER_TENSOR ? 0
                          : table_per == QK_TABLE_PER_ROW  ? row
                          : table_per == QK_TABLE_PER_TILE ? row / kTableRows * groups + g
                                                           : row * groups + g;
    return table << bits;
  }
  // Entries of all tables.
  int64_t table_entries() const {
    const int64_t tables = kind != QK_KIND_TABLE              ? 0
                           : table_per == QK_TABLE_PER_TENSOR ? 1
                           : table_per == QK_TABLE_PER_ROW    ? n
                           : table_per == QK_TABLE_PER_TILE
                               ? div_up<int64_t>(n, kTableRows) * groups
                               : n * groups;
    return tables << bits;
  }
};

// NULL, or the sentence that says why this weight has no layout here.
inline const char* make_layout(const qk_weight& w, Layout* out) {
  Layout l = {};
  if (w.n < 1 || w.k < 1) return "a weight needs at least one row and one column";
  if (w.n >= (int64_t)1 << 31 || w.k >= (int64_t)1 << 30)
    return "a weight of 2^31 rows or 2^30 columns is not supported";
  if (w.kind != QK_KIND_INT && w.kind != QK_KIND_TABLE)
    return "the kind of a weight must be QK_KIND_INT or QK_KIND_TABLE";
  const bool floats = w.activations == QK_ACT_FLOAT;
  if (w.bits != 2 && w.bits != 3 && w.bits != 4 && w.bits != 8)
    return "the CUDA layout has 2, 3, 4 or 8 bits";
  if (w.group < 0) return "the group size of a weight must not be negative";
  if (w.kind == QK_KIND_TABLE && !w.codebook) return "a table weight needs a codebook";
  if (w.kind == QK_KIND_TABLE && (uint32_t)w.table_per > QK_TABLE_PER_TILE)
    return "table_per must be one of QK_TABLE_PER_TENSOR, ROW, GROUP, TILE";
  if (w.kind == QK_KIND_TABLE && w.table_per == QK_TABLE_PER_TILE && w.bits != 3)
    return "tables per tile have 8 entries, codes of 3 bits";
  l.n = w.n;
  l.k = w.k;
  l.group = w.group > 0 && w.group < w.k ? w.group : w.k;
  l.kind = w.kind;
  l.bits = w.bits;
  l.activations = w.activations;
  l.groups = div_up(l.k, l.group);
  l.table_per = w.kind != QK_KIND_TABLE                              ? QK_TABLE_PER_TENSOR
                : w.table_per == QK_TABLE_PER_GROUP && l.groups == 1 ? QK_TABLE_PER_ROW
                                                                     : w.table_per;
  const bool whole = w.bits == 8 || (w.bits == 4 && w.kind == QK_KIND_INT);  // codes are numbers
  l.order = floats  ? whole ? Order::kSplit : Order::kAdjacent
            : whole ? Order::kByte
                    : Order::kLookup;
  const bool block_tables = !whole && l.table_per > QK_TABLE_PER_ROW;
  l.unit = block_tables ? kBlockColumns : floats ? 16 : 32;
  const int64_t padded = l.groups == 1
                             ? l.k
                             : (l.groups - 1) * div_up<int64_t>(l.group, l.unit) * l.unit +
                                   (l.k - (l.groups - 1) * l.group);
  l.k_blocks = div_up<int64_t>(padded, kBlockColumns);
  l.k_padded = l.k_blocks * kBlockColumns;
  if (l.k_padded >= (int64_t)1 << 31)
    return "a weight of 2^31 columns, those that pad its groups included, is not supported";
  l.group_padded = l.groups == 1 ? l.k_padded : div_up<int64_t>(l.group, l.unit) * l.unit;
  l.row_tiles = div_up<int64_t>(l.n, kTileRows);
  l.scale_dtype = l.scale_stored = l.zero_dtype = l.zero_stored = -1;
  int scale_bytes = 0, zero_bytes = 0;
  if (w.scales) {
    l.scale_dtype = w.scale_dtype;
    l.scale_stored = w.scale_dtype == QK_E8M0   ? QK_BF16
                     : w.scale_dtype == QK_E4M3 ? QK_F16
                                                : w.scale_dtype;
    if (l.scale_stored != QK_F32 && l.scale_stored != QK_F16 && l.scale_stored != QK_BF16)
      return "scales must be float32, float16, bfloat16, e8m0 or e4m3";
    scale_bytes = dtype_size(l.scale_stored);
  }
  if (w.zeros) {
    if (w.kind != QK_KIND_INT) return "only integer weights have zeros";
    l.zero_dtype = w.zero_dtype;
    l.zero_stored = w.zero_dtype == QK_U8 ? QK_F16 : w.zero_dtype;
    if (l.zero_stored != QK_F32 && l.zero_stored != QK_F16 && l.zero_stored != QK_BF16)
      return "zeros must be uint8, float32, float16 or bfloat16";
    zero_bytes = dtype_size(l.zero_stored);
  }
  l.perm = w.perm != nullptr;
  l.block_bytes = (int64_t)l.bits * kVectorBytes;
  const int64_t cells = l.row_tiles * l.groups * kTileRows;
  l.block_table_bytes =
      block_tables ? (kTileRows / (l.shared_tables() ? kTableRows : 1) << l.bits) * (floats ? 2 : 1)
                   : 0;
  l.factors = floats && block_tables && !l.shared_tables();
  const auto aligned = [](int64_t bytes) { return div_up<int64_t>(bytes, 128) * 128; };
  l.codes_offset = 0;
  l.scales_offset = aligned(l.row_tiles * l.k_blocks * l.block_bytes);
  l.zeros_offset = l.scales_offset + aligned(cells * scale_bytes);
  l.table_offset = l.zeros_offset + aligned(cells * zero_bytes);
  l.perm_offset = l.table_offset + aligned(l.table_entries() * 4);
  const int64_t block_tables_bytes = aligned(l.row_tiles * l.groups * l.block_table_bytes);
  l.block_tables_offset[0] = l.perm_offset + aligned(l.perm ? l.k * 4 : 0);
  l.block_tables_offset[1] = l.block_tables_offset[0] + (floats ? block_tables_bytes : 0);
  l.factors_offset = l.block_tables_offset[1] + block_tables_bytes;
  l.total_bytes = l.factors_offset + aligned(l.factors ? cells * 4 : 0);
  *out = l;
  return nullptr;
}

}  // namespace cuda
}  // namespace qkern
