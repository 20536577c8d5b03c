// SPDX-License-Identifier: Apache-2.0
// One call of qk_linear with everything in guarded memory, and its oracle in double precision.
#pragma once

#include <string>
#include <vector>

#include "activations.h"
#include "report.h"
#include "weights.h"

namespace sweep {

// How a host may run the tasks of a call: here any number of "threads", one after the other, in
// an order that no kernel may rely on.
class Scattered {
 public:
  explicit Scattered(int32_t threads) : threads_(threads) {
    parallel_ = {sizeof parallel_, &Scattered::threads, &Scattered::run, this};
  }
  const qk_parallel* get() const { return &parallel_; }

 private:
  static int32_t threads(void* self) { return static_cast<Scattered*>(self)->threads_; }
  static void run(void*, int64_t tasks, qk_task fn, void* arg);

  int32_t threads_;
  qk_parallel parallel_;
};

struct LinearCall {
  int64_t m = 1;
  qk_dtype x_dtype = QK_F32, y_dtype = QK_F32, bias_dtype = QK_F32;
  bool bias = false, special = false;  // special: NaN, infinity, -0, subnormal among the values
  Lay lay = Lay::kDense;
  int64_t y_gap = 0;        // elements between rows of y
  int32_t threads = 0;      // of a Scattered; 0: the library's own pool
  bool own_scratch = true;  // the caller brings the workspace
  int64_t misplaced = 0;    // bytes that bias and y lie behind an aligned address

  std::string describe() const;
};

// Holds the operands of a call; run() may be called for one kernel after the other.
class LinearProblem {
 public:
  LinearProblem(const Weight& weight, const LinearCall& call, Random& random);

  // Runs one kernel under the level in force; the result is in y(), dense. Reports every byte
  // that was written outside.
  qk_status run(const char* kernel, Report& report, const std::string& name);
  const std::vector<uint8_t>& y() const { return y_; }

  // y of row `m` alone, from dense float32 (the values are exactly those of x).
  qk_status run_row(int64_t m, std::vector<uint8_t>* y);
  // Holds y() against double precision; returns false and a sentence where it is too far off.
  bool matches_oracle(const std::vector<uint8_t>& y, std::string* why) const;

  Matrix& x() { return x_; }

 private:
  void fill(Random& random);
  void add_products(int64_t m, std::vector<double>* sum, std::vector<double>* magnitude) const;
  std::vector<double> stored_row(int64_t m) const;
  int64_t activation_group() const;

  const Weight& weight_;
  const LinearCall call_;
  Matrix x_;
  Guarded bias_, out_, workspace_;
  bool out_at_end_, workspace_at_end_;
  std::vector<uint8_t> y_;
};

}  // namespace sweep
