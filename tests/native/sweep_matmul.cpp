// SPDX-License-Identifier: Apache-2.0
// int8_matmul: exact sums in 64 bits against every kernel, operands of any stride between guard
// pages.

#include <algorithm>

#include "guarded.h"
#include "report.h"

namespace sweep {
namespace {

// A matrix of int8 at strides of its own: row by row, column by column, with gaps, backwards.
struct Operand {
  Guarded memory;
  int64_t row_stride, column_stride, first;

  void draw(int64_t rows, int64_t columns, Random& random) {
    const bool by_rows = random.one_in(2);
    const int64_t gap = random.one_in(2) ? 0 : random.between(1, 70);
    const int64_t inner = by_rows ? columns : rows, outer = by_rows ? rows : columns;
    const int64_t step = random.one_in(6) ? 2 : 1;
    const int64_t line = (inner - 1) * step + 1 + gap, bytes = (outer - 1) * line + line - gap;
    memory.place(bytes, random.one_in(2) ? Flush::kBegin : Flush::kEnd);
    const int64_t kind = random.below(4);
    for (int64_t i = 0; i < bytes; ++i)
      memory.data()[i] = kind == 0   ? 0x80  // -128 times -128: what saturating pairs get wrong
                         : kind == 1 ? (random.one_in(2) ? 0x80 : 0x7f)
                                     : (uint8_t)random.below(256);
    row_stride = by_rows ? line : step;
    column_stride = by_rows ? step : line;
    first = 0;
    if (random.one_in(4)) {  // from the last row back
      first = (rows - 1) * row_stride;
      row_stride = -row_stride;
    }
    memory.lock();
  }
  const int8_t* base() const { return (const int8_t*)memory.data() + first; }
  int64_t at(int64_t row, int64_t column) const {
    return base()[row * row_stride + column * column_stride];
  }
};

}  // namespace

void sweep_matmul(Report& report) {
  const std::vector<Row> rows = report.rows("int8_matmul");
  const int64_t cases = std::max<int64_t>(200, report.options.cases);
  for (int64_t i = 0; i < cases && !rows.empty(); ++i) {
    Random random(report.options.seed * 43 + (uint64_t)i);
    const int64_t m = 1 + i * 3 % 19 + (i % 8 == 5 ? 60 : 0), n = 1 + i * 7 % 71,
                  k = i % 16 == 15 ? 1000 + i % 67 : i % 131;
    Operand a, b;
    a.draw(m, std::max<int64_t>(k, 1), random);
    b.draw(std::max<int64_t>(k, 1), n, random);
    const int64_t stride = n + (random.one_in(2) ? 0 : random.between(1, 9));
    std::vector<int32_t> expected((size_t)(m * n));
    for (int64_t r = 0; r < m; ++r)
      for (int64_t c = 0; c < n; ++c) {
        int64_t sum = 0;
        for (int64_t j = 0; j < k; ++j) sum += a.at(r, j) * b.at(j, c);
        expected[(size_t)(r * n + c)] = (int32_t)sum;
      }
    std::snprintf(context, sizeof context, "int8_matmul case %lld: m %lld n %lld k %lld",
                  (long long)i, (long long)m, (long long)n, (long long)k);
    for (const Row& row : rows) {
      Guarded out;
      qk_int8_matmul_args args = {};
      args.struct_size = sizeof args;
      args.a = a.base();
      args.b = b.base();
      args.c = (int32_t*)out.place(4 * ((m - 1) * stride + n), Flush::kEnd, 4);
      args.m = m;
      args.n = n;
      args.k = k;
      args.a_row_stride = a.row_stride;
      args.a_col_stride = a.column_stride;
      args.b_row_stride = b.row_stride;
      args.b_col_stride = b.column_stride;
      args.c_row_stride = stride;
      args.kernel = row.name.c_str();
      running = row.name.c_str();
      qk_set_isa(row.isa);
      Tally& tally = report.of(row.name);
      ++tally.cases;
      if (qk_int8_matmul(&args) != QK_OK) {
        report.fail(row.name, "failed: %s", qk_last_error());
        continue;
      }
      bool same = true, gaps = out.intact();
      for (int64_t r = 0; r < m; ++r)
        for (int64_t c = 0; c < stride && (r + 1 < m || c < n); ++c) {
          const int32_t got = args.c[r * stride + c];
          if (c >= n)
            gaps = gaps && (uint32_t)got == 0xa5a5a5a5u;
          else
            same = same && got == expected[(size_t)(r * n + c)];
        }
      report.check(row.name, same, "sums differ");
      report.check(row.name, gaps, "wrote outside its output");
      for (int32_t sum : expected) tally.digest.add((uint32_t)sum);
    }
  }
}

}  // namespace sweep
