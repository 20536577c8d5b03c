// SPDX-License-Identifier: Apache-2.0
// Every linear kernel against the scalar one, bit for bit, over shapes, strides, dtypes and places
// in memory; the scalar one against double precision.
//
// The outer loop draws cases per class of weights, never per kernel: the scalar results, and so
// their digest, are the same on every machine, whatever kernels it has.

#include <algorithm>
#include <bitset>

#include "linear.h"

namespace sweep {
namespace {

constexpr int64_t kCallsPerWeight = 4;
constexpr int64_t kMostWork = 150000;  // multiply-adds of one scalar call

// Every N of two panels and one more; now and then several panels.
int64_t outputs_of(int64_t weight) {
  static const int64_t many[] = {96, 97, 127, 128, 129, 175, 257};
  return weight % 8 == 7 ? many[weight / 8 % 7] : 1 + weight * 29 % 65;
}

// Every remainder over two of the largest units (128 columns); now and then the borders of a chunk.
int64_t columns_of(int64_t weight) {
  static const int64_t many[] = {511, 512, 513, 1023, 1024, 1025, 1100, 1300, 2049, 2100};
  return weight % 8 == 3 ? many[weight / 8 % 10] : 1 + weight * 101 % 263;
}

int64_t group_of(int64_t weight, int64_t k) {
  const int64_t groups[] = {0,  32, 64, 128,   8,   16, 12, 5,  100, 31,          33, 3,
                            20, 7,  1,  k - 1, 256, k,  96, 48, 24,  (k + 1) / 2, 130};
  return std::min(k, groups[weight % 23]);
}

int64_t rows_of(int64_t call) {
  static const int64_t rows[] = {1, 2, 3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13,
                                 1, 4, 16, 17, 24, 25, 31, 32, 33, 47, 48, 49, 65};
  return rows[call * 7 % 26];
}

// The work of the scalar kernel per row: groups are padded to units of up to 32 (128) columns.
int64_t work_of(const Class& c, const Shape& s) {
  const int64_t group = s.group > 0 ? s.group : s.k, unit = c.kind >= Class::kRowTable ? 128 : 32;
  return ceil_div(s.n, 16) * 16 * ceil_div(s.k, group) * ceil_div(group, unit) * unit;
}

Shape shape_of(const Class& c, int64_t weight) {
  Shape s = {outputs_of(weight), columns_of(weight), 0};
  s.group = group_of(weight, s.k);
  // Tables per group are large: few of them per row where codes have many bits.
  const int64_t least = c.bits > 4 ? 64 : 8;
  if (c.kind == Class::kGroupTable && s.group > 0)
    s.group = std::min(s.k, std::max(s.group, least));
  while (work_of(c, s) > kMostWork && s.n > 16) s.n -= 16;
  return s;
}

LinearCall call_of(const Class& c, const Shape& shape, int64_t number, Random& random) {
  static const qk_dtype dtypes[] = {QK_F32, QK_F16, QK_BF16};
  LinearCall call;
  call.m = rows_of(number);
  while (call.m > 1 && call.m * work_of(c, shape) > kMostWork) call.m = (call.m + 1) / 2;
  call.x_dtype = dtypes[random.one_in(2) ? 0 : random.below(3)];
  call.y_dtype = dtypes[random.one_in(2) ? 0 : random.below(3)];
  call.bias_dtype = dtypes[random.one_in(2) ? 0 : random.below(3)];
  call.bias = random.one_in(2);
  call.special = random.one_in(12);
  call.lay = random.one_in(3) ? Lay::kDense : (Lay)random.below((int64_t)Lay::kCount);
  call.y_gap = random.one_in(2) ? 0 : random.between(1, 19);
  static const int32_t threads[] = {1, 2, 3, 5, 7, 16};
  call.threads = random.one_in(4) ? 0 : random.pick(threads);
  call.own_scratch = !random.one_in(4);
  call.misplaced = random.one_in(3) ? random.below(64) : 0;
  return call;
}

struct Coverage {
  std::bitset<32> outputs;
  std::bitset<128> columns;
  std::bitset<10> rows;

  void add(const Shape& s, int64_t m) {
    outputs.set((size_t)(s.n % 32));
    columns.set((size_t)(s.k % 128));
    if (m < 10) rows.set((size_t)m);
  }
  bool complete() const { return outputs.all() && columns.all() && rows.count() == 9; }
};

const char* scalar_kernel(const Class& c) {
  return c.activations == QK_ACT_FLOAT ? "linear_any_a32_scalar" : "linear_any_a8d_scalar";
}

// The rows that read this weight, asked through a call without rows.
std::vector<Row> rows_that_serve(const Weight& w, const std::vector<Row>& rows, Report& report) {
  std::vector<Row> serving;
  for (const Row& row : rows) {
    qk_set_isa(row.isa);
    qk_linear_args args = {};
    args.struct_size = sizeof args;
    args.packed = w.packed().data();
    args.packed_bytes = w.packed().bytes();
    args.kernel = row.name.c_str();
    const qk_status status = qk_linear(&args);
    if (status == QK_OK)
      serving.push_back(row);
    else if (status != QK_UNSUPPORTED)
      report.fail(row.name, "refused a call without rows: %s", qk_last_error());
  }
  return serving;
}

bool same_bits(qk_dtype dtype, const std::vector<uint8_t>& a, const uint8_t* b, int64_t* where) {
  const int64_t count = (int64_t)a.size() / size_of(dtype);
  if (std::memcmp(a.data(), b, a.size()) == 0) return true;
  for (int64_t i = 0; i < count; ++i)
    if (canonical_bits(dtype, a.data(), i) != canonical_bits(dtype, b, i)) {
      *where = i;
      return false;
    }
  return true;
}

class Sweep {
 public:
  Sweep(Report& report, const Class& c, std::vector<Row> rows)
      : report_(report), class_(c), rows_(std::move(rows)) {}

  void run() {
    const int64_t calls = report_.options.cases;
    for (int64_t i = 0; i < calls; ++i) {
      if (i % kCallsPerWeight == 0) next_weight(i / kCallsPerWeight);
      if (serving_.empty()) continue;
      Random random(report_.options.seed << 32 ^ (uint64_t)(i * 4096 + class_number()));
      one_call(call_of(class_, shape_, i, random), i, random);
    }
    if (report_.options.full() && !serving_.empty())
      report_.check(scalar_kernel(class_), coverage_.complete(),
                    "not every remainder of N and K was met");
  }

 private:
  int64_t class_number() const {
    return (class_.kind * 8 + class_.bits - 1) * 3 + class_.activations;
  }

  void next_weight(int64_t number) {
    Random random(report_.options.seed * 7919 + (uint64_t)(number * 4096 + class_number()));
    shape_ = shape_of(class_, number);
    weight_.draw(class_, shape_, number, random, number % 3 == 1);
    std::snprintf(context, sizeof context, "%s %s", class_.name().c_str(),
                  weight_.describe().c_str());
    qk_set_isa(QK_ISA_SCALAR);
    serving_.clear();
    if (weight_.pack(random) != QK_OK)
      report_.fail(scalar_kernel(class_), "cannot pack: %s", qk_last_error());
    else
      serving_ = rows_that_serve(weight_, rows_, report_);
  }

  void one_call(const LinearCall& call, int64_t number, Random& random) {
    const std::string scalar = scalar_kernel(class_);
    std::snprintf(context, sizeof context, "%s case %lld: %s, %s", class_.name().c_str(),
                  (long long)number, weight_.describe().c_str(), call.describe().c_str());
    LinearProblem problem(weight_, call, random);
    qk_set_isa(QK_ISA_SCALAR);
    if (problem.run(scalar.c_str(), report_, scalar) != QK_OK) {
      report_.fail(scalar, "failed: %s", qk_last_error());
      return;
    }
    coverage_.add(shape_, call.m);
    const std::vector<uint8_t> expected = problem.y();
    check_scalar(problem, call, expected, number, random);
    Digest digest;
    digest.add(call.y_dtype, expected.data(), (int64_t)expected.size() / size_of(call.y_dtype));
    for (const Row& row : serving_) {
      if (row.name != scalar) check_row(problem, call, row, expected);
      if (!report_.wants(row.name)) continue;
      Tally& tally = report_.of(row.name);
      ++tally.cases;
      tally.digest.add((uint32_t)digest.value());
      tally.digest.add((uint32_t)(digest.value() >> 32));
    }
  }

  void check_row(LinearProblem& problem, const LinearCall& call, const Row& row,
                 const std::vector<uint8_t>& expected) {
    qk_set_isa(row.isa);
    if (problem.run(row.name.c_str(), report_, row.name) != QK_OK) {
      report_.fail(row.name, "failed: %s", qk_last_error());
      return;
    }
    int64_t where = 0;
    if (!same_bits(call.y_dtype, problem.y(), expected.data(), &where))
      report_.fail(row.name, "differs from scalar at row %lld, output %lld: %.9g, not %.9g",
                   (long long)(where / shape_.n), (long long)(where % shape_.n),
                   decode(call.y_dtype, problem.y().data(), where),
                   decode(call.y_dtype, expected.data(), where));
  }

  void check_scalar(LinearProblem& problem, const LinearCall& call,
                    const std::vector<uint8_t>& expected, int64_t number, Random& random) {
    const std::string scalar = scalar_kernel(class_);
    std::string why;
    if (number % 2 == 0 && !problem.matches_oracle(expected, &why))
      report_.fail(scalar, "%s", why.c_str());
    // A row alone, dense and in float32, has the bits it has in the batch.
    const int64_t m = random.below(call.m);
    std::vector<uint8_t> alone;
    int64_t where = 0;
    if (problem.run_row(m, &alone) != QK_OK)
      report_.fail(scalar, "failed for a single row: %s", qk_last_error());
    else if (!same_bits(call.y_dtype, alone, expected.data() + m * (int64_t)alone.size(), &where))
      report_.fail(scalar, "row %lld alone differs at output %lld", (long long)m, (long long)where);
  }

  Report& report_;
  const Class class_;
  const std::vector<Row> rows_;
  Weight weight_;
  Shape shape_ = {};
  std::vector<Row> serving_;
  Coverage coverage_;
};

// A weight of a class, small, to see which rows exist for it at all.
bool anyone_serves(const Class& c, const std::vector<Row>& rows, Report& report) {
  Random random(1);
  Weight weight;
  weight.draw(c, {5, 40, 0}, 0, random, false);
  return weight.pack(random) == QK_OK && !rows_that_serve(weight, rows, report).empty();
}

}  // namespace

void sweep_linear(Report& report) {
  const std::vector<Row> rows = report.rows("linear");
  for (const Row& row : rows) report.of(row.name);
  for (const Class& c : all_classes())
    if (anyone_serves(c, rows, report)) Sweep(report, c, rows).run();
  for (const Row& row : rows)
    report.check(row.name, report.of(row.name).cases >= report.options.cases,
                 "no class of weights reaches this kernel often enough");
}

}  // namespace sweep
