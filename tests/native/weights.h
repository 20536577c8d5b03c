// SPDX-License-Identifier: Apache-2.0
// Weights of every kind the interface knows, drawn from a seed, in guarded canonical storage and
// packed.
#pragma once

#include <string>
#include <vector>

#include "guarded.h"
#include "numbers.h"

namespace sweep {

// A class of weights: what registry rows differ in.
struct Class {
  enum Kind { kInt, kTable, kTileTable, kRowTable, kGroupTable } kind;  // the last two: row lanes
  int bits;
  qk_activations activations;

  std::string name() const;
};

std::vector<Class> all_classes();

struct Shape {
  int64_t n, k, group;  // group 0: the whole row
};

class Weight {
 public:
  // Draws the parts of weight number `index` of a class. `exact`: scales are powers of two and
  // tables hold small integers, so that products with small integers are exact.
  void draw(const Class& c, const Shape& shape, int64_t index, Random& random, bool exact);
  qk_status pack(Random& random);

  const qk_weight& weight() const { return weight_; }
  const Guarded& packed() const { return packed_; }
  Guarded& packed() { return packed_; }
  std::string describe() const;
  int64_t n() const { return weight_.n; }
  int64_t k() const { return weight_.k; }
  int64_t group() const { return group_; }
  int64_t groups() const { return groups_; }
  int64_t tables() const;
  bool exact() const { return exact_; }

  // Of the stored column k: its code, scale, zero, and what the contract calls v.
  int code(int64_t n, int64_t k) const { return codes_[(size_t)(n * weight_.k + k)]; }
  double scale(int64_t n, int64_t k) const;  // without table_scale
  double zero(int64_t n, int64_t k) const;   // 0 where there are no zeros
  double value(int64_t n, int64_t k) const;
  int64_t input_column(int64_t k) const { return weight_.perm ? weight_.perm[k] : k; }

  // Compares canonical parts written by qk_unpack (dense) with this weight's.
  bool same_parts(const qk_weight_out& out) const;

 private:
  void draw_codes(Random& random, int64_t index);
  void draw_scales(Random& random, int64_t index);
  void draw_zeros(Random& random, int64_t index);
  void draw_tables(Random& random, Class::Kind kind);

  qk_weight weight_ = {};
  int64_t group_ = 0, groups_ = 0;
  bool exact_ = false;
  std::vector<uint8_t> codes_;  // one byte each
  Guarded stream_, scales_, zeros_, codebook_, perm_, packed_;
};

}  // namespace sweep
