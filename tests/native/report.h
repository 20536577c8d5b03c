// SPDX-License-Identifier: Apache-2.0
// What the sweep counts and prints, and the choices of its command line.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "numbers.h"

namespace sweep {

struct Options {
  int64_t cases = 24;  // per class of weights
  uint64_t seed = 1;
  std::string kernel;        // only this row
  std::string skip;          // all but this row
  qk_isa isa = QK_ISA_AUTO;  // no level above this one

  bool full() const { return cases >= 2500; }
};

struct Tally {
  int64_t cases = 0, failures = 0;
  Digest digest;  // of the scalar results of its cases: the same on every machine
};

// Rows of the registry that this run looks at.
struct Row {
  std::string name, op;
  qk_isa isa;
};

class Report {
 public:
  explicit Report(Options options) : options(std::move(options)) {}

  Tally& of(const std::string& name) {
    if (!tallies_.count(name)) order_.push_back(name);
    return tallies_[name];
  }
  // One sentence per failure, the first few of each row.
  [[gnu::format(printf, 3, 4)]] void fail(const std::string& name, const char* format, ...);
  void check(const std::string& name, bool good, const char* what) {
    if (!good) fail(name, "%s", what);
  }
  // Prints the table and returns the exit status.
  int finish() const;
  std::vector<Row> rows(const char* op) const;
  bool wants(const std::string& name) const {
    return (options.kernel.empty() || options.kernel == name) && options.skip != name;
  }

  const Options options;

 private:
  std::map<std::string, Tally> tallies_;
  std::vector<std::string> order_;
};

// What is being run, for the sentence of a failure or of a fault.
extern char context[512];
extern const char* running;  // the kernel

void sweep_linear(Report& report);
void sweep_quantize(Report& report);
void sweep_convert(Report& report);
void sweep_dequantize(Report& report);
void sweep_matmul(Report& report);
void sweep_storage(Report& report);
void sweep_codes(Report& report);
void sweep_fit(Report& report);
void sweep_header(Report& report);

}  // namespace sweep
