// SPDX-License-Identifier: Apache-2.0
// The fitting calls against plain code written from their descriptions in qkern.h.

#include <algorithm>

#include "guarded.h"
#include "report.h"

namespace sweep {
namespace {

Flush side(Random& random) { return random.one_in(2) ? Flush::kBegin : Flush::kEnd; }

struct Floats {
  Guarded memory;
  int64_t n, k, stride;
  float* data;

  void place(int64_t rows, int64_t columns, Random& random) {
    n = rows;
    k = columns;
    stride = k + random.below(7);
    data = (float*)memory.place(4 * ((n - 1) * stride + k), side(random), 4, 0, 0xff);
    const int64_t kind = random.below(5);
    for (int64_t i = 0; i < n * k; ++i) {
      double v = random.symmetric() * (kind == 0 ? 1000 : 1);
      if (kind == 1) v = std::fabs(v) + 1;               // one sign only
      if (kind == 2) v = (double)random.between(-3, 3);  // ties and repeats
      if (kind == 3 && i / k % 2) v = 0;                 // rows of zeros
      data[i / k * stride + i % k] = (float)v;
    }
    memory.lock();
  }
  float at(int64_t r, int64_t c) const { return data[r * stride + c]; }
};

int code_at(const uint8_t* stream, int64_t row_bytes, int bits, int64_t r, int64_t c) {
  int code = 0;
  for (int b = 0; b < bits; ++b) {
    const int64_t bit = c * bits + b;
    code |= (stream[r * row_bytes + bit / 8] >> (bit % 8) & 1) << b;
  }
  return code;
}

struct Grid {
  float scale;  // as it is stored
  int zero;
};

Grid grid_of(const Floats& w, int64_t r, int64_t begin, int64_t end, const qk_fit_rtn_args& a) {
  const int levels = (1 << a.bits) - 1, half = 1 << (a.bits - 1);
  float low = 0, high = 0;
  for (int64_t c = begin; c < end; ++c) {
    low = std::fmin(low, w.at(r, c));
    high = std::fmax(high, w.at(r, c));
  }
  const float most = std::fmax(-low, high);
  const float exact = a.symmetric ? most / (float)(half - 1) : (high - low) / (float)levels;
  uint32_t stored = 0;
  encode(a.scale_dtype, &stored, 0, low == 0 && high == 0 ? 1.0 : (double)exact);
  const float scale = (float)decode(a.scale_dtype, &stored, 0);
  const int zero = a.symmetric ? half : std::clamp((int)std::nearbyint(-low / scale), 0, levels);
  return {scale, zero};
}

void fit_rtn(int64_t i, Report& report, Tally& tally) {
  Random random(report.options.seed * 53 + (uint64_t)i);
  const int bits = 2 + (int)(i % 7), levels = (1 << bits) - 1;
  const bool symmetric = i % 2;
  static const qk_dtype dtypes[] = {QK_F32, QK_F16, QK_BF16};
  const qk_dtype dtype = dtypes[i / 2 % 3];
  Floats w;
  w.place(1 + i % 5, 1 + i * 7 % 150, random);
  const int64_t group = random.one_in(3) ? w.k : random.between(1, w.k);
  const int64_t groups = ceil_div(w.k, group), row = ceil_div(w.k * bits, 8);
  Guarded codes, scales, zeros;
  qk_fit_rtn_args args = {};
  args.struct_size = sizeof args;
  args.bits = bits;
  args.w = w.data;
  args.n = w.n;
  args.k = w.k;
  args.w_stride = w.stride;
  args.group = group;
  args.symmetric = symmetric;
  args.scale_dtype = dtype;
  args.codes = codes.place(w.n * row, side(random));
  args.codes_stride_bytes = row;
  args.scales = scales.place(w.n * groups * size_of(dtype), side(random), 4);
  args.zeros = symmetric ? nullptr : zeros.place(w.n * groups, side(random));
  std::vector<Grid> grids;
  bool fits = true;  // in the dtype of the scales
  for (int64_t g = 0; g < w.n * groups; ++g) {
    const int64_t begin = g % groups * group;
    grids.push_back(grid_of(w, g / groups, begin, std::min(w.k, begin + group), args));
    fits = fits && (dtype != QK_F16 || grids.back().scale >= std::ldexp(1.f, -14));
  }
  const qk_status status = qk_fit_rtn(&args);
  bool same = codes.intact() && scales.intact() && (symmetric || zeros.intact());
  if (!fits) {  // refused, and nothing is written
    for (int64_t j = 0; j < codes.bytes(); ++j) same = same && args.codes[j] == 0xa5;
    report.check("fit_rtn", same && status == QK_BAD_FORMAT, "a scale that does not fit");
    return;
  }
  if (status != QK_OK) {
    report.fail("fit_rtn", "failed: %s", qk_last_error());
    return;
  }
  for (int64_t g = 0; g < w.n * groups; ++g) {
    const int64_t r = g / groups, begin = g % groups * group, end = std::min(w.k, begin + group);
    const Grid grid = grids[(size_t)g];
    same = same && (float)decode(dtype, args.scales, g) == grid.scale;
    same = same && (symmetric || args.zeros[g] == grid.zero);
    for (int64_t c = begin; c < end; ++c) {
      const float quotient = w.at(r, c) / grid.scale;
      const int code = std::clamp((int)std::nearbyint(quotient) + grid.zero, 0, levels);
      same = same && code_at(args.codes, row, bits, r, c) == code;
    }
  }
  report.check("fit_rtn", same, "scales, zeros or codes differ");
  tally.digest.add(QK_U8, args.codes, w.n * row);
}

void fit_table(int64_t i, Report& report, Tally& tally) {
  Random random(report.options.seed * 59 + (uint64_t)i);
  const int bits = 1 + (int)(i % 8), entries = 1 << bits;
  Floats w;
  w.place(1 + i % 4, 1 + i * 11 % 150, random);
  const int64_t group = random.one_in(3) ? w.k : random.between(1, w.k);
  const int64_t groups = ceil_div(w.k, group), row = ceil_div(w.k * bits, 8);
  const qk_table_per per = (qk_table_per)(i / 8 % 3);
  const int64_t tables = per == QK_TABLE_PER_TENSOR ? 1
                         : per == QK_TABLE_PER_ROW  ? w.n
                                                    : w.n * groups;
  Guarded codes, scales, table;
  float* book = (float*)table.place(4 * tables * entries, side(random), 4);
  for (int64_t e = 0; e < tables * entries; ++e)
    book[e] = random.one_in(3) ? (float)random.between(-2, 2) : (float)random.symmetric();
  table.lock();
  float* scale = nullptr;
  if (random.one_in(2)) {
    scale = (float*)scales.place(4 * w.n * groups, side(random), 4);
    for (int64_t e = 0; e < w.n * groups; ++e) scale[e] = (float)(0.6 + 0.5 * random.symmetric());
  }
  qk_fit_table_args args = {};
  args.struct_size = sizeof args;
  args.bits = bits;
  args.w = w.data;
  args.n = w.n;
  args.k = w.k;
  args.w_stride = w.stride;
  args.group = group;
  args.scales = scale;
  args.codebook = book;
  args.table_per = per;
  args.codes = codes.place(w.n * row, side(random));
  args.codes_stride_bytes = row;
  if (qk_fit_table(&args) != QK_OK) {
    report.fail("fit_table", "failed: %s", qk_last_error());
    return;
  }
  bool same = codes.intact();
  for (int64_t j = 0; j < w.n * w.k; ++j) {
    const int64_t r = j / w.k, c = j % w.k, g = r * groups + c / group;
    const float* t = book + (per == QK_TABLE_PER_TENSOR ? 0
                             : per == QK_TABLE_PER_ROW  ? r
                                                        : g) *
                                entries;
    const float quotient = w.at(r, c) / (scale ? scale[g] : 1.f);
    const double v = quotient;
    float best = t[0];
    for (int e = 1; e < entries; ++e) {
      const double distance = std::fabs(v - t[e]), least = std::fabs(v - best);
      if (distance < least || (distance == least && t[e] < best)) best = t[e];
    }
    same = same && t[code_at(args.codes, row, bits, r, c)] == best;
  }
  report.check("fit_table", same, "a code is not that of the nearest entry");
  tally.digest.add(QK_U8, args.codes, w.n * row);
}

// Least sum of squares over all ways to cut sorted values into at most `centres` runs.
double least_error(std::vector<double> v, int centres) {
  std::sort(v.begin(), v.end());
  const size_t n = v.size();
  const auto run_error = [&](size_t a, size_t b) {
    double mean = 0, error = 0;
    for (size_t i = a; i < b; ++i) mean += v[i] / (double)(b - a);
    for (size_t i = a; i < b; ++i) error += (v[i] - mean) * (v[i] - mean);
    return error;
  };
  std::vector<double> cost(n * (n + 1));
  for (size_t a = 0; a < n; ++a)
    for (size_t b = a + 1; b <= n; ++b) cost[a * (n + 1) + b] = run_error(a, b);
  std::vector<double> best(n + 1, INFINITY);
  best[0] = 0;
  for (int c = 0; c < centres; ++c) {
    std::vector<double> next = best;
    for (size_t b = 1; b <= n; ++b)
      for (size_t a = 0; a < b; ++a) next[b] = std::min(next[b], best[a] + cost[a * (n + 1) + b]);
    best = next;
  }
  return best[n];
}

void fit_kmeans(int64_t i, Report& report, Tally& tally) {
  Random random(report.options.seed * 61 + (uint64_t)i);
  const int bits = 1 + (int)(i % 4), entries = 1 << bits;
  Floats w;
  w.place(1 + i % 3, 1 + i * 5 % 40, random);
  const int64_t row = ceil_div(w.k * bits, 8);
  Guarded codes, table, errors;
  qk_fit_kmeans_args args = {};
  args.struct_size = sizeof args;
  args.bits = bits;
  args.w = w.data;
  args.n = w.n;
  args.k = w.k;
  args.w_stride = w.stride;
  args.table_per = QK_TABLE_PER_ROW;
  args.group = w.k;
  args.codebook = (float*)table.place(4 * w.n * entries, side(random), 4);
  args.codes = codes.place(w.n * row, side(random));
  args.codes_stride_bytes = row;
  args.errors = (double*)errors.place(8 * w.n, side(random), 8);
  if (qk_fit_kmeans(&args) != QK_OK) {
    report.fail("fit_kmeans", "failed: %s", qk_last_error());
    return;
  }
  bool good = codes.intact() && table.intact() && errors.intact();
  for (int64_t r = 0; r < w.n; ++r) {
    const float* t = args.codebook + r * entries;
    std::vector<double> values;
    double error = 0;
    for (int64_t c = 0; c < w.k; ++c) {
      values.push_back(w.at(r, c));
      const double d = w.at(r, c) - (double)t[code_at(args.codes, row, bits, r, c)];
      error += d * d;
    }
    const double least = least_error(values, entries);
    // Centres are rounded to float32: each moves by at most 2^-24 of the largest value, which adds
    // at most twice that times the spread, per column; the rest is double arithmetic.
    double most = 0;
    for (double v : values) most = std::fmax(most, std::fabs(v));
    const double bound = (double)w.k * std::ldexp(most * most, -40) + 1e-10 * least;
    good = good && std::fabs(error - least) <= bound && std::is_sorted(t, t + entries);
  }
  report.check("fit_kmeans", good, "the error is not the least, or entries do not ascend");
  tally.digest.add(QK_U8, args.codes, w.n * row);
}

}  // namespace

void sweep_fit(Report& report) {
  const int64_t cases = std::max<int64_t>(120, report.options.cases);
  const auto sweep = [&](const char* name, void (*fit)(int64_t, Report&, Tally&)) {
    if (!report.wants(name)) return;
    Tally& tally = report.of(name);
    for (int64_t i = 0; i < cases; ++i) {
      std::snprintf(context, sizeof context, "%s case %lld", name, (long long)i);
      ++tally.cases;
      fit(i, report, tally);
    }
  };
  sweep("fit_rtn", fit_rtn);
  sweep("fit_table", fit_table);
  sweep("fit_kmeans", fit_kmeans);
}

}  // namespace sweep
