// SPDX-License-Identifier: Apache-2.0
// Nearest entry of a table, decided exactly.
//
// Between two neighbouring entries p < q of the sorted table stands the largest float t with
// 2 t <= p + q; a float x belongs to q's side exactly where x > t. So a tie goes to the lower entry
// and no rounding takes part. Of equal entries (0 and -0 are equal) the lowest code stands for all.
#pragma once

#include <math.h>

#include <algorithm>

#include "codes.h"

namespace qkern {

class Nearest {
 public:
  // `table` has 2^bits finite entries in any order.
  void build(const float* table, int bits) {
    uint8_t order[256];
    const int size = 1 << bits;
    step_ = size >> 1;
    for (int i = 0; i < size; ++i) order[i] = (uint8_t)i;
    std::sort(order, order + size, [table](uint8_t a, uint8_t b) {
      return table[a] != table[b] ? table[a] < table[b] : a < b;
    });
    int distinct = 0;
    for (int i = 0; i < size; ++i) {
      if (distinct > 0 && table[order[i]] == table[code_[distinct - 1]]) continue;
      if (distinct > 0)
        above_[distinct - 1] = threshold(table[code_[distinct - 1]], table[order[i]]);
      code_[distinct++] = order[i];
    }
    for (int i = distinct - 1; i < size; ++i) above_[i] = INFINITY;  // never passed
  }

  uint8_t code(float x) const {
    int at = 0;
    for (int step = step_; step > 0; step >>= 1) at += x > above_[at + step - 1] ? step : 0;
    return code_[at];
  }

 private:
  static float threshold(float p, float q) {
    const double sum = (double)p + q, from_p = sum - p;
    const double rest = ((double)p - (sum - from_p)) + (q - from_p);  // p + q = sum + rest, exactly
    const auto passes = [&](float t) { return 2.0 * t > sum || (2.0 * t == sum && rest < 0); };
    float t = (float)(sum / 2);
    while (passes(t)) t = nextafterf(t, -INFINITY);
    for (float up; !passes(up = nextafterf(t, INFINITY));) t = up;
    return t;
  }

  int step_;
  float above_[256];
  uint8_t code_[256];
};

// Which table serves column c of a row.
struct TableMap {
  const float* tables;
  qk_table_per per;
  int64_t group, groups;  // columns per group, groups per row
  int bits;

  const float* at(int64_t row, int64_t g) const {
    const int64_t index = per == QK_TABLE_PER_TENSOR ? 0
                          : per == QK_TABLE_PER_ROW  ? row
                                                     : row * groups + g;
    return tables + (index << bits);
  }
};

// Codes of one row. `shared` is the one table of a tensor, else NULL. `scales` holds the row's
// scales per group, or is NULL.
static inline void encode_row(const TableMap& map, const Nearest* shared, const float* w, int64_t k,
                              int64_t row, const float* scales, uint8_t* stream) {
  const bool whole = !scales && map.per != QK_TABLE_PER_GROUP;  // groups make no difference
  Nearest own;
  const float* built = nullptr;
  write_codes(k, map.bits, stream, [&](int64_t begin, int64_t end, uint8_t* codes) {
    for (int64_t c = begin; c < end;) {
      const int64_t g = whole ? 0 : c / map.group;
      const int64_t stop = whole ? end : min64(end, (g + 1) * map.group);
      const float* table = map.at(row, g);
      if (!shared && table != built) own.build(built = table, map.bits);
      const Nearest& nearest = shared ? *shared : own;
      const float scale = scales ? scales[g] : 1.0f;
      // A scale of 0 makes every entry 0: any code is right, that of the entry next to 0 is taken.
      for (; c < stop; ++c) codes[c - begin] = nearest.code(scale == 0 ? 0.0f : w[c] / scale);
    }
  });
}

}  // namespace qkern
