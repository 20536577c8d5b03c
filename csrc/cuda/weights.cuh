// SPDX-License-Identifier: Apache-2.0
// A packed weight, element by element and lane by lane, for whatever needs its values and not a
// product. Pure functions for host and device.
//
// The value of a weight:
//   integers  w = fl(scale * fl(code - zero))
//   tables    w = fl(fl(scale * table_scale) * table[code])
#pragma once

#include "layout.cuh"

namespace qkern {
namespace cuda {

struct Weights {
  Layout layout;
  float table_scale;
  const uint8_t* packed;

  QK_HD float scale(int64_t row, int64_t g) const {
    return layout.scale_stored < 0 ? 1.f
                                   : load_number(packed + layout.scales_offset, layout.scale_stored,
                                                 layout.scale_index(row, g));
  }
  QK_HD float zero(int64_t row, int64_t g) const {
    return layout.zero_stored < 0 ? (float)(1 << (layout.bits - 1))
                                  : load_number(packed + layout.zeros_offset, layout.zero_stored,
                                                layout.scale_index(row, g));
  }
  QK_HD const float* table(int64_t row, int64_t g) const {
    return (const float*)(packed + layout.table_offset) + layout.table_index(row, g);
  }
  QK_HD float value(int64_t row, int64_t g, int code, float scale, float zero) const {
    return layout.kind == QK_KIND_INT ? mul_rn(scale, sub_rn((float)code, zero))
                                      : mul_rn(mul_rn(scale, table_scale), table(row, g)[code]);
  }
  QK_HD float at(int64_t row, int64_t column) const {
    const int64_t g = column / layout.group;
    return value(row, g, layout.code(packed, row, layout.padded_column(column)), scale(row, g),
                 zero(row, g));
  }
  // Where a column of the weight lies in the input, -1 where perm is out of range.
  QK_HD int64_t input_column(int64_t column) const {
    if (!layout.perm) return column;
    const int64_t to = ((const int32_t*)(packed + layout.perm_offset))[column];
    return to >= 0 && to < layout.k ? to : -1;
  }
};

// The codes of one lane for (i, h, j), out of its vectors. All arguments but the words are known
// when this is compiled, so a code costs one bit-field extraction (two with 3 bits).
template <Order kOrder, int kBits>
QK_HD int lane_code(const Vector* vectors, Slot slot) {
  int code = 0;
  for (int part = 0; part < place_count(kBits); ++part) {
    const Place p = place_of(kOrder, kBits, slot, part);
    code |= (int)(vectors[p.vector].word[p.word] >> p.shift & ((1u << p.width) - 1)) << p.low;
  }
  return code;
}

// f(Codes<order, bits>{}) of this layout.
template <Order kOrder_, int kBits_>
struct Codes {
  static constexpr Order kOrder = kOrder_;
  static constexpr int kBits = kBits_;
};
template <class F>
void with_codes(const Layout& l, F&& f) {
  if (l.order == Order::kSplit)
    return l.bits == 4 ? f(Codes<Order::kSplit, 4>{}) : f(Codes<Order::kSplit, 8>{});
  if (l.order == Order::kByte)
    return l.bits == 4 ? f(Codes<Order::kByte, 4>{}) : f(Codes<Order::kByte, 8>{});
  if (l.order == Order::kAdjacent)
    return l.bits == 4   ? f(Codes<Order::kAdjacent, 4>{})
           : l.bits == 3 ? f(Codes<Order::kAdjacent, 3>{})
                         : f(Codes<Order::kAdjacent, 2>{});
  return l.bits == 4   ? f(Codes<Order::kLookup, 4>{})
         : l.bits == 3 ? f(Codes<Order::kLookup, 3>{})
                       : f(Codes<Order::kLookup, 2>{});
}

}  // namespace cuda
}  // namespace qkern
