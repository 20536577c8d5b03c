// SPDX-License-Identifier: Apache-2.0
// The values of a segment (a rectangle of the weight) as sorted, distinct, weighted points: where
// every fit of a table begins.
//
// Values of importance 0 take no part (they still get codes); where a whole segment has importance
// 0, every value counts 1.
#pragma once

#include <algorithm>

#include "fit_buffer.h"
#include "numeric.h"

namespace qkern {
namespace {

// Ascending distinct values with weights above 0.
struct Points {
  const float* value;
  const double* weight;
  uint32_t count;
};

constexpr size_t kRadixFrom = 512;  // fewer keys are sorted by comparison

// Maps floats to integers of the same order; 0 and -0 become one value.
inline uint32_t key_of(float value) {
  const uint32_t bits = float_bits(value + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
inline float value_of(uint32_t key) {
  return bits_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

// Sorts by the 32 bits of each item that begin at `shift`: three counting passes of 11 bits, less
// those in which all items agree.
template <class Item>
void sort_keys(Buffer<Item>& items, Buffer<Item>& spare, int shift) {
  if (items.size() < kRadixFrom) {
    std::sort(items.begin(), items.end(), [](Item a, Item b) { return a < b; });
    return;
  }
  constexpr int kPasses = 3, kBits = 11;
  constexpr uint32_t kBuckets = 1u << kBits;
  Buffer<size_t> places;
  places.resize(kPasses * kBuckets);
  std::fill(places.begin(), places.end(), 0);
  const auto bucket = [shift](Item item, int pass) {
    return (uint32_t)(item >> shift) >> (pass * kBits) & (kBuckets - 1);
  };
  for (const Item item : items)
    for (int pass = 0; pass < kPasses; ++pass) ++places[pass * kBuckets + bucket(item, pass)];
  spare.resize(items.size());
  for (int pass = 0; pass < kPasses; ++pass) {
    size_t* place = &places[pass * kBuckets];
    if (place[bucket(items[0], pass)] == items.size()) continue;
    size_t sum = 0;
    for (uint32_t b = 0; b < kBuckets; ++b) {
      const size_t count = place[b];
      place[b] = sum;
      sum += count;
    }
    for (const Item item : items) spare[place[bucket(item, pass)]++] = item;
    items.swap(spare);
  }
}

struct Segment {
  int64_t row, rows, column, columns;
};

// A weight and the importance of its elements (NULL: 1; stride 0: one vector for all rows).
struct Source {
  const float* w;
  int64_t w_stride;
  const float* importance;
  int64_t importance_stride;
};

// Keeps its buffers from one segment to the next. Throws std::bad_alloc.
class Gatherer {
 public:
  explicit Gatherer(const Source& source) : a_(source) {}

  Points points(const Segment& segment) {
    if (!a_.importance || !gather_weighted(segment)) gather(segment);
    return {values_.data(), weights_.data(), (uint32_t)values_.size()};
  }

 private:
  void gather(const Segment& s) {
    keys_.resize((size_t)(s.rows * s.columns));
    uint32_t* key = keys_.data();
    for (int64_t r = 0; r < s.rows; ++r) {
      const float* w = a_.w + (s.row + r) * a_.w_stride + s.column;
      for (int64_t c = 0; c < s.columns; ++c) *key++ = key_of(w[c]);
    }
    sort_keys(keys_, spare_keys_, 0);
    clear_points(keys_.size());
    for (const uint32_t k : keys_) add_point(value_of(k), 1.0);
  }

  // Items are a value's key above the bits of its importance. False where no importance is above 0.
  bool gather_weighted(const Segment& s) {
    items_.reset((size_t)(s.rows * s.columns));
    for (int64_t r = 0; r < s.rows; ++r) {
      const float* w = a_.w + (s.row + r) * a_.w_stride + s.column;
      const float* importance = a_.importance + (s.row + r) * a_.importance_stride + s.column;
      for (int64_t c = 0; c < s.columns; ++c)
        if (importance[c] > 0)
          items_.push((uint64_t)key_of(w[c]) << 32 | float_bits(importance[c]));
    }
    if (items_.size() == 0) return false;
    sort_keys(items_, spare_items_, 32);
    clear_points(items_.size());
    for (const uint64_t item : items_)
      add_point(value_of((uint32_t)(item >> 32)), bits_float((uint32_t)item));
    return true;
  }

  void clear_points(size_t most) {
    values_.reset(most);
    weights_.reset(most);
  }

  void add_point(float value, double weight) {
    const size_t count = values_.size();
    if (count > 0 && values_[count - 1] == value) {
      weights_[count - 1] += weight;
    } else {
      values_.push(value);
      weights_.push(weight);
    }
  }

  const Source a_;
  Buffer<uint32_t> keys_, spare_keys_;
  Buffer<uint64_t> items_, spare_items_;
  Buffer<float> values_;
  Buffer<double> weights_;
};

}  // namespace
}  // namespace qkern
