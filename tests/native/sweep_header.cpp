// SPDX-License-Identifier: Apache-2.0
// Damaged packed weights: every call that takes one must refuse a header with any change, a block
// that is cut off, and an address that is not aligned, without touching what lies outside.

#include <algorithm>

#include "report.h"
#include "weights.h"

namespace sweep {
namespace {

constexpr int64_t kHeader = 256;

// True where every call refuses the block, each with a sentence.
bool refused(const void* packed, int64_t bytes) {
  float x[512] = {}, y[512] = {};
  const auto bad = [](qk_status status) { return status != QK_OK && *qk_last_error() != '\0'; };
  qk_weight weight = {};
  weight.struct_size = sizeof weight;
  qk_weight_out out = {};
  out.struct_size = sizeof out;
  qk_linear_args linear = {};
  linear.struct_size = sizeof linear;
  linear.packed = packed;
  linear.packed_bytes = bytes;
  linear.x = x;
  linear.m = 1;
  linear.x_row_stride = 512;
  linear.x_col_stride = 1;
  linear.y = y;
  linear.y_row_stride = 512;
  int64_t workspace = 0;
  qk_dequantize_args rows = {};
  rows.struct_size = sizeof rows;
  rows.packed = packed;
  rows.packed_bytes = bytes;
  rows.row_count = 1;
  rows.out = y;
  rows.out_row_stride = 512;
  char text[256];
  return bad(qk_packed_describe(packed, bytes, &weight)) && bad(qk_unpack(packed, bytes, &out)) &&
         bad(qk_linear(&linear)) && bad(qk_linear_workspace(&linear, &workspace)) &&
         bad(qk_dequantize(&rows)) && qk_linear_explain(packed, bytes, text, sizeof text) < 0;
}

class Damage {
 public:
  Damage(const Weight& weight, Report& report, Tally& tally)
      : weight_(weight), report_(report), tally_(tally) {}

  void every_bit() {
    for (int64_t bit = 0; bit < 8 * kHeader; ++bit) {
      uint8_t* block = copy(weight_.packed().bytes());
      block[bit / 8] ^= (uint8_t)(1 << (bit % 8));
      expect(block, weight_.packed().bytes(), "a header with one bit changed is accepted");
    }
  }

  // Whole bytes, words and stretches; typical wrong sizes; parts of other headers.
  void mutations(int64_t count, Random& random) {
    static const uint64_t sizes[] = {0,
                                     1,
                                     0x7fffffff,
                                     0x80000000,
                                     0xffffffff,
                                     ~(uint64_t)0,
                                     (uint64_t)1 << 40,
                                     (uint64_t)1 << 62,
                                     (uint64_t)1 << 63};
    for (int64_t i = 0; i < count; ++i) {
      uint8_t* block = copy(weight_.packed().bytes());
      const int64_t changes = random.between(1, 4);
      for (int64_t c = 0; c < changes; ++c) {
        const int64_t at = random.below(kHeader / 8) * 8, length = random.between(1, 16);
        const uint64_t size = random.pick(sizes);
        if (random.one_in(2))
          std::memcpy(block + at, &size, 8);
        else
          for (int64_t j = at; j < std::min(kHeader, at + length); ++j)
            block[j] = (uint8_t)random.next();
      }
      if (std::memcmp(block, weight_.packed().data(), (size_t)kHeader) == 0) continue;
      expect(block, weight_.packed().bytes(), "a changed header is accepted");
    }
  }

  void cut_off() {
    const int64_t whole = weight_.packed().bytes();
    for (int64_t bytes = 0; bytes < whole; bytes += bytes < kHeader + 64 ? 1 : 61) {
      // The block is flush against unreadable memory where it is cut, as far as alignment allows.
      const int64_t room = (bytes + 63) / 64 * 64;
      uint8_t* block = memory_.place(room, Flush::kEnd, 64);
      std::memcpy(block, weight_.packed().data(), (size_t)bytes);
      expect(block, bytes, "a block that is cut off is accepted");
    }
    uint8_t* block = copy(whole);
    for (int64_t bytes : {(int64_t)-1, INT64_MIN, (int64_t)0, kHeader - 1})
      expect(block, bytes, "a length that makes no sense is accepted");
    expect(nullptr, whole, "NULL is accepted");
  }

  void misplaced() {
    for (int64_t offset = 1; offset < 64; ++offset) {
      uint8_t* block = memory_.place(weight_.packed().bytes(), Flush::kBegin, 1, offset);
      std::memcpy(block, weight_.packed().data(), (size_t)weight_.packed().bytes());
      expect(block, weight_.packed().bytes(), "a block that is not aligned is accepted");
    }
  }

 private:
  uint8_t* copy(int64_t bytes) {
    uint8_t* block = memory_.place(bytes, Flush::kEnd, 64);
    std::memcpy(block, weight_.packed().data(), (size_t)bytes);
    return block;
  }

  void expect(const uint8_t* block, int64_t bytes, const char* otherwise) {
    ++tally_.cases;
    report_.check("packed_header", refused(block, bytes), otherwise);
  }

  const Weight& weight_;
  Report& report_;
  Tally& tally_;
  Guarded memory_;
};

}  // namespace

void sweep_header(Report& report) {
  if (!report.wants("packed_header")) return;
  Tally& tally = report.of("packed_header");
  static const Class classes[] = {{Class::kInt, 4, QK_ACT_INT8},
                                  {Class::kTable, 4, QK_ACT_FLOAT},
                                  {Class::kGroupTable, 3, QK_ACT_INT8_GROUP},
                                  {Class::kInt, 7, QK_ACT_FLOAT}};
  qk_set_isa(report.options.isa);
  for (int64_t i = 0; i < 4; ++i) {
    Random random(report.options.seed * 67 + (uint64_t)i);
    Weight weight;
    weight.draw(classes[i], {19 + i, 70 + i, 32}, i, random, false);
    std::snprintf(context, sizeof context, "packed_header: %s", weight.describe().c_str());
    if (weight.pack(random) != QK_OK) {
      report.fail("packed_header", "cannot pack: %s", qk_last_error());
      continue;
    }
    Damage damage(weight, report, tally);
    damage.every_bit();
    damage.mutations(2 * report.options.cases, random);
    damage.cut_off();
    damage.misplaced();
  }
}

}  // namespace sweep
