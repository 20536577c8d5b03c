// SPDX-License-Identifier: Apache-2.0
// The kernels of rows: quantization of activations, conversion of 16-bit activations, dequantize.
// Each against an expectation computed here, bit for bit; the digest is of the scalar results.

#include <algorithm>

#include "activations.h"
#include "report.h"
#include "weights.h"

namespace sweep {
namespace {

constexpr qk_dtype kFloats[] = {QK_F32, QK_F16, QK_BF16};

// ---- quantize_activations ----

struct QuantizeCase {
  int64_t m, k, group, gap;
  Matrix x;
  Guarded q, scales;
  std::vector<int8_t> codes;
  std::vector<float> expected_scales;
};

void draw_row(QuantizeCase& c, int64_t m, Random& random) {
  const int64_t kind = random.below(8);
  const double loud = std::ldexp(1.0, (int)random.between(-16, 13));
  for (int64_t k = 0; k < c.k; ++k) {
    double v = loud * random.symmetric();
    if (kind == 0) v = (double)random.between(-127, 126) + 0.5;  // ties where the maximum is 127
    if (kind == 1) v = 0;
    if (kind == 2) v = std::ldexp(random.symmetric(), -110);  // counts as zero
    if (kind == 3) v = std::ldexp(random.symmetric(), -99);   // just not
    c.x.set(m, k, v);
  }
  if (kind == 0) c.x.set(m, random.below(c.k), 127);
  static const double specials[] = {NAN, INFINITY, -INFINITY};
  const int64_t place = random.below(c.k);
  if (kind == 4) c.x.set(m, place, random.pick(specials));
}

void expect_quantized(QuantizeCase& c) {
  c.codes.clear();
  c.expected_scales.clear();
  for (int64_t m = 0; m < c.m; ++m)
    for (int64_t begin = 0; begin < c.k; begin += c.group) {
      std::vector<double> values;
      for (int64_t k = begin; k < std::min(c.k, begin + c.group); ++k)
        values.push_back(c.x.get(m, k));
      c.codes.resize(c.codes.size() + values.size());
      c.expected_scales.push_back(
          quantize_group(values, c.codes.data() + (int64_t)(c.codes.size() - values.size())));
    }
}

void run_quantize(QuantizeCase& c, const Row& row, Report& report, Random& random) {
  const int64_t stride = c.k + c.gap, groups = ceil_div(c.k, c.group);
  const Flush flush = random.one_in(2) ? Flush::kBegin : Flush::kEnd;
  qk_quantize_args args = {};
  args.struct_size = sizeof args;
  args.x_dtype = c.x.dtype();
  args.x = c.x.base();
  args.m = c.m;
  args.k = c.k;
  args.group = c.group;
  args.x_row_stride = c.x.row_stride();
  args.x_col_stride = c.x.column_stride();
  args.q = (int8_t*)c.q.place((c.m - 1) * stride + c.k, flush);
  args.q_row_stride = stride;
  args.scales = (float*)c.scales.place(4 * c.m * groups, flush, 4);
  args.kernel = row.name.c_str();
  running = row.name.c_str();
  qk_set_isa(row.isa);
  if (qk_quantize_activations(&args) != QK_OK) {
    report.fail(row.name, "failed: %s", qk_last_error());
    return;
  }
  bool codes = true, gaps = true, scales = true;
  for (int64_t m = 0; m < c.m; ++m) {
    const int8_t* q = args.q + m * stride;
    codes = codes && std::memcmp(q, c.codes.data() + m * c.k, (size_t)c.k) == 0;
    for (int64_t k = c.k; m + 1 < c.m && k < stride; ++k) gaps = gaps && (uint8_t)q[k] == 0xa5;
  }
  for (int64_t i = 0; i < c.m * groups; ++i)
    scales = scales && canonical_bits(QK_F32, args.scales, i) ==
                           canonical_bits(QK_F32, c.expected_scales.data(), i);
  report.check(row.name, codes, "codes differ");
  report.check(row.name, scales, "scales differ");
  report.check(row.name, gaps && c.q.intact() && c.scales.intact(), "wrote outside its outputs");
}

// ---- dequantize ----

// The weight in input order, rounded as the contract says and once more to `dtype`.
void expect_row(const Weight& w, int64_t n, qk_dtype dtype, uint8_t* out) {
  for (int64_t k = 0; k < w.k(); ++k) {
    const float scale = (float)w.scale(n, k);
    float value;
    if (w.weight().kind == QK_KIND_TABLE) {
      const float factor = scale * w.weight().table_scale;
      value = factor * (float)w.value(n, k);
    } else {
      const float difference = (float)w.value(n, k) - (float)w.zero(n, k);
      value = scale * difference;
    }
    encode(dtype, out, w.input_column(k), (double)value);
  }
}

struct DequantizeCase {
  const Weight& weight;
  bool packed;
  qk_dtype dtype;
  std::vector<int64_t> rows;  // empty: a range
  int64_t begin, count, gap;
};

void run_dequantize(const DequantizeCase& c, const Row& row, Report& report, Random& random,
                    Digest* digest) {
  const int size = size_of(c.dtype);
  const int64_t k = c.weight.k(), stride = k + c.gap;
  Guarded out, indices;
  qk_dequantize_args args = {};
  args.struct_size = sizeof args;
  args.out_dtype = c.dtype;
  if (c.packed) {
    args.packed = c.weight.packed().data();
    args.packed_bytes = c.weight.packed().bytes();
  } else {
    args.weight = &c.weight.weight();
  }
  if (!c.rows.empty()) {
    int64_t* at = (int64_t*)indices.place(8 * c.count, Flush::kEnd, 8);
    std::copy(c.rows.begin(), c.rows.end(), at);
    args.rows = at;
  }
  args.row_begin = c.begin;
  args.row_count = c.count;
  args.out = out.place(((c.count - 1) * stride + k) * size,
                       random.one_in(2) ? Flush::kBegin : Flush::kEnd);
  args.out_row_stride = stride;
  // The level chooses what decodes the packed layout.
  args.kernel = row.op == "unpack" ? nullptr : row.name.c_str();
  running = row.name.c_str();
  qk_set_isa(row.isa);
  if (qk_dequantize(&args) != QK_OK) {
    report.fail(row.name, "failed: %s", qk_last_error());
    return;
  }
  bool same = true, gaps = true;
  std::vector<uint8_t> expected((size_t)(k * size));
  for (int64_t i = 0; i < c.count; ++i) {
    const uint8_t* got = out.data() + i * stride * size;
    expect_row(c.weight, c.rows.empty() ? c.begin + i : c.rows[(size_t)i], c.dtype,
               expected.data());
    for (int64_t j = 0; j < k; ++j)
      if (same && canonical_bits(c.dtype, got, j) != canonical_bits(c.dtype, expected.data(), j)) {
        report.fail(row.name, "row %lld of %lld, column %lld is %.9g, not %.9g (dtype %d)",
                    (long long)i, (long long)c.count, (long long)j, decode(c.dtype, got, j),
                    decode(c.dtype, expected.data(), j), c.dtype);
        same = false;
      }
    for (int64_t j = k * size; i + 1 < c.count && j < stride * size; ++j)
      gaps = gaps && got[j] == 0xa5;
    digest->add(c.dtype, expected.data(), k);
  }
  report.check(row.name, gaps && out.intact(), "wrote outside its output");
}

}  // namespace

void sweep_quantize(Report& report) {
  const std::vector<Row> rows = report.rows("quantize_activations");
  const int64_t cases = std::max<int64_t>(200, report.options.cases);
  static const int64_t groups[] = {0, 8, 16, 20, 32, 33, 64, 128, 7, 1};
  for (int64_t i = 0; i < cases && !rows.empty(); ++i) {
    Random random(report.options.seed * 31 + (uint64_t)i);
    QuantizeCase c;
    c.m = 1 + i % 6;
    c.k = i % 16 == 15 ? 1000 + i % 131 : 1 + i * 7 % 200;
    const int64_t group = groups[i / 3 % 10];
    c.group = group > 0 ? std::min(group, c.k) : c.k;
    c.gap = random.one_in(2) ? 0 : random.below(40);
    Lay lay = random.one_in(2) ? Lay::kDense : (Lay)random.below((int64_t)Lay::kCount);
    c.x.place(random.pick(kFloats), c.m, c.k, lay, random);
    for (int64_t m = 0; m < c.m; ++m) draw_row(c, m, random);
    c.x.memory().lock();
    expect_quantized(c);
    std::snprintf(context, sizeof context, "quantize case %lld: m %lld k %lld group %lld dtype %d",
                  (long long)i, (long long)c.m, (long long)c.k, (long long)c.group, c.x.dtype());
    for (const Row& row : rows) {
      run_quantize(c, row, report, random);
      Tally& tally = report.of(row.name);
      ++tally.cases;
      for (int8_t code : c.codes) tally.digest.add((uint32_t)code);
      tally.digest.add(QK_F32, c.expected_scales.data(), (int64_t)c.expected_scales.size());
    }
  }
}

// Conversion has no call of its own: a linear call with an identity of one-bit codes gives the
// converted values back. All finite patterns of both dtypes, in rows of every length.
void sweep_convert(Report& report) {
  for (const Row& row : report.rows("convert"))
    for (int64_t i = 0; i < std::max<int64_t>(100, report.options.cases); ++i) {
      Random random(report.options.seed * 37 + (uint64_t)i);
      const qk_dtype dtype = i % 2 ? QK_F16 : QK_BF16;
      const int64_t k = 1 + i % 131, m = 5;
      std::vector<uint8_t> codes((size_t)(k * ceil_div(k, 8)));
      const float table[] = {0, 1};
      for (int64_t j = 0; j < k; ++j)
        codes[(size_t)(j * ceil_div(k, 8) + j / 8)] = (uint8_t)(1 << (j % 8));
      qk_weight w = {};
      w.struct_size = sizeof w;
      w.bits = 1;
      w.n = w.k = k;
      w.codes = codes.data();
      w.codes_stride_bytes = ceil_div(k, 8);
      w.kind = QK_KIND_TABLE;
      w.codebook = table;
      w.table_scale = 1;
      Guarded packed, y;
      int64_t bytes = 0;
      qk_packed_bytes(&w, &bytes);
      packed.place(bytes, Flush::kEnd, 64);
      Matrix x;
      x.place(dtype, m, k, i % 3 ? Lay::kDense : Lay::kPadded, random);
      uint16_t pattern = (uint16_t)(i / 2 * 665);
      for (int64_t j = 0; j < m * k; ++j, ++pattern) {
        while (!std::isfinite(decode(dtype, &pattern, 0))) ++pattern;
        x.set(j / k, j % k, decode(dtype, &pattern, 0));
      }
      qk_linear_args args = {};
      args.struct_size = sizeof args;
      args.x_dtype = dtype;
      args.packed = packed.data();
      args.packed_bytes = bytes;
      args.x = x.base();
      args.m = m;
      args.x_row_stride = x.row_stride();
      args.x_col_stride = 1;
      args.y = y.place(4 * m * k, Flush::kEnd);
      args.y_row_stride = k;
      args.kernel = "linear_any_a32_scalar";
      running = row.name.c_str();
      qk_set_isa(row.isa);
      std::snprintf(context, sizeof context, "convert case %lld: k %lld dtype %d", (long long)i,
                    (long long)k, dtype);
      Tally& tally = report.of(row.name);
      ++tally.cases;
      if (qk_pack(&w, packed.data(), bytes) != QK_OK || qk_linear(&args) != QK_OK) {
        report.fail(row.name, "failed: %s", qk_last_error());
        continue;
      }
      bool same = true;
      for (int64_t j = 0; j < m * k; ++j) {
        const float got = (float)decode(QK_F32, y.data(), j), given = (float)x.get(j / k, j % k);
        same = same && got == given;
        tally.digest.add(canonical_bits(QK_F32, &given, 0));
      }
      report.check(row.name, same, "values differ");
    }
}

void sweep_dequantize(Report& report) {
  const std::vector<Row> rows = report.rows("dequantize"), unpackers = report.rows("unpack");
  const std::vector<Class> classes = all_classes();
  const int64_t cases = std::max<int64_t>((int64_t)classes.size(), report.options.cases);
  for (int64_t i = 0; i < cases && !(rows.empty() && unpackers.empty()); ++i) {
    Random random(report.options.seed * 41 + (uint64_t)i);
    const Class c = classes[(size_t)(i % (int64_t)classes.size())];
    static const int64_t groups[] = {0, 8, 16, 32, 33, 64, 100, 128, 5};
    const Shape shape = {1 + i * 5 % 37, 1 + i * 11 % 300, groups[i / 7 % 9]};
    Weight weight;
    weight.draw(c, shape, i / 2, random, false);
    std::snprintf(context, sizeof context, "dequantize case %lld: %s %s", (long long)i,
                  c.name().c_str(), weight.describe().c_str());
    if (weight.pack(random) != QK_OK) {
      report.fail("dequantize", "cannot pack: %s", qk_last_error());
      continue;
    }
    DequantizeCase d = {weight, i % 3 == 0, random.pick(kFloats), {}, 0, weight.n(), 0};
    d.gap = random.one_in(2) ? 0 : random.below(9);
    if (random.one_in(2)) {
      d.begin = random.below(weight.n());
      d.count = random.between(1, weight.n() - d.begin);
    } else {
      d.count = random.between(1, 9);
      for (int64_t r = 0; r < d.count; ++r) d.rows.push_back(random.below(weight.n()));
    }
    for (const Row& row : rows) {
      Tally& tally = report.of(row.name);
      ++tally.cases;
      run_dequantize(d, row, report, random, &tally.digest);
    }
    d.packed = true;
    for (const Row& row : unpackers) {
      Tally& tally = report.of(row.name);
      ++tally.cases;
      run_dequantize(d, row, report, random, &tally.digest);
    }
  }
}

}  // namespace sweep
