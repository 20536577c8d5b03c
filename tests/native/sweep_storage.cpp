// SPDX-License-Identifier: Apache-2.0
// Canonical storage to the packed layout and back, and the bit stream of codes.

#include <algorithm>

#include "report.h"
#include "weights.h"

namespace sweep {
namespace {

Flush side(Random& random) { return random.one_in(2) ? Flush::kBegin : Flush::kEnd; }

void check_round_trip(const Weight& w, Report& report, Random& random, Tally& tally) {
  const qk_weight& given = w.weight();
  const int64_t values = w.n() * w.groups();
  Guarded codes, scales, zeros, codebook, perm;
  qk_weight_out out = {};
  out.struct_size = sizeof out;
  out.codes = codes.place(w.n() * ceil_div(w.k() * given.bits, 8), side(random));
  if (given.scales) out.scales = scales.place(values * size_of(given.scale_dtype), side(random), 4);
  if (given.zeros) out.zeros = zeros.place(values * size_of(given.zero_dtype), side(random), 4);
  if (given.codebook)
    out.codebook = (float*)codebook.place(4 * w.tables() << given.bits, side(random), 4);
  if (given.perm) out.perm = (int32_t*)perm.place(4 * w.k(), side(random), 4);
  if (qk_unpack(w.packed().data(), w.packed().bytes(), &out) != QK_OK) {
    report.fail("pack", "cannot unpack: %s", qk_last_error());
    return;
  }
  report.check("pack", w.same_parts(out), "unpacked parts differ");
  report.check("pack", codes.intact(), "wrote outside the codes");
  report.check("pack", !given.scales || scales.intact(), "wrote outside the scales");
  report.check("pack", !given.zeros || zeros.intact(), "wrote outside the zeros");
  report.check("pack", !given.codebook || codebook.intact(), "wrote outside the codebook");
  report.check("pack", !given.perm || perm.intact(), "wrote outside perm");
  tally.digest.add(QK_U8, out.codes, codes.bytes());

  qk_weight described = {};
  described.struct_size = sizeof described;
  const bool known =
      qk_packed_describe(w.packed().data(), w.packed().bytes(), &described) == QK_OK &&
      described.kind == given.kind && described.bits == given.bits && described.n == given.n &&
      described.k == given.k && described.group == w.group() &&
      described.activations == given.activations && !described.scales == !given.scales &&
      !described.zeros == !given.zeros && !described.codebook == !given.codebook &&
      !described.perm == !given.perm && described.table_scale == given.table_scale;
  report.check("pack", known, "qk_packed_describe says something else");

  // The same bytes at another address: nothing in the block depends on where it lies.
  Guarded moved;
  std::memcpy(moved.place(w.packed().bytes(), Flush::kBegin, 64), w.packed().data(),
              (size_t)w.packed().bytes());
  std::memset(out.codes, 0, (size_t)codes.bytes());
  report.check("pack", qk_unpack(moved.data(), moved.bytes(), &out) == QK_OK && w.same_parts(out),
               "a moved block unpacks to something else");
}

}  // namespace

void sweep_storage(Report& report) {
  if (!report.wants("pack")) return;
  Tally& tally = report.of("pack");
  const std::vector<Class> classes = all_classes();
  const int64_t cases = std::max<int64_t>((int64_t)classes.size(), report.options.cases);
  static const int64_t groups[] = {0, 8, 32, 64, 128, 12, 31, 100, 5};
  for (int64_t i = 0; i < cases; ++i) {
    Random random(report.options.seed * 43 + (uint64_t)i);
    const Class c = classes[(size_t)(i % (int64_t)classes.size())];
    Weight weight;
    weight.draw(c, {1 + i * 13 % 70, 1 + i * 17 % 290, groups[i / 5 % 9]}, i, random, false);
    std::snprintf(context, sizeof context, "pack case %lld: %s %s", (long long)i, c.name().c_str(),
                  weight.describe().c_str());
    ++tally.cases;
    if (weight.pack(random) != QK_OK) {
      report.fail("pack", "cannot pack: %s", qk_last_error());
      continue;
    }
    report.check("pack", weight.packed().intact(), "wrote outside the block");
    check_round_trip(weight, report, random, tally);
  }
}

void sweep_codes(Report& report) {
  if (!report.wants("codes")) return;
  Tally& tally = report.of("codes");
  for (int64_t i = 0; i < std::max<int64_t>(200, report.options.cases); ++i) {
    Random random(report.options.seed * 47 + (uint64_t)i);
    const int bits = 1 + (int)(i % 8);
    const int64_t n = 1 + i % 5, k = 1 + i * 7 % 300, row = ceil_div(k * bits, 8);
    const int64_t gap = random.below(9), stream_gap = random.below(5);
    std::snprintf(context, sizeof context, "codes case %lld: %lld x %lld, %d bits", (long long)i,
                  (long long)n, (long long)k, bits);
    Guarded codes, stream, back;
    uint8_t* given = codes.place((n - 1) * (k + gap) + k, side(random));
    for (int64_t j = 0; j < n * k; ++j)
      given[j / k * (k + gap) + j % k] = (uint8_t)random.below((int64_t)1 << bits);
    codes.lock();
    uint8_t* packed = stream.place((n - 1) * (row + stream_gap) + row, side(random));
    uint8_t* got = back.place((n - 1) * (k + gap) + k, side(random));
    ++tally.cases;
    if (qk_codes_pack(given, n, k, k + gap, bits, packed, row + stream_gap) != QK_OK ||
        qk_codes_unpack(packed, n, k, row + stream_gap, bits, got, k + gap) != QK_OK) {
      report.fail("codes", "failed: %s", qk_last_error());
      continue;
    }
    bool same = true, gaps = true, bit_by_bit = true, padding = true;
    for (int64_t r = 0; r < n; ++r) {
      const uint8_t* line = packed + r * (row + stream_gap);
      same = same && std::memcmp(given + r * (k + gap), got + r * (k + gap), (size_t)k) == 0;
      for (int64_t b = 0; b < k * bits; ++b)
        bit_by_bit = bit_by_bit && (line[b / 8] >> (b % 8) & 1) ==
                                       (given[r * (k + gap) + b / bits] >> (b % bits) & 1);
      if (k * bits % 8) padding = padding && line[row - 1] >> (k * bits % 8) == 0;
      for (int64_t j = k; r + 1 < n && j < k + gap; ++j)
        gaps = gaps && got[r * (k + gap) + j] == 0xa5;
      for (int64_t j = row; r + 1 < n && j < row + stream_gap; ++j) gaps = gaps && line[j] == 0xa5;
      tally.digest.add(QK_U8, line, row);
    }
    report.check("codes", same, "codes differ after the round trip");
    report.check("codes", bit_by_bit, "the stream is not little-endian and dense");
    report.check("codes", padding, "bits behind the last code are not 0");
    report.check("codes", gaps && stream.intact() && back.intact(), "wrote outside its outputs");
  }
}

}  // namespace sweep
