// SPDX-License-Identifier: Apache-2.0
// The sweep: every kernel of the registry that this machine can run, through the C interface only.
//
//   sweep [--cases N] [--kernel NAME] [--skip NAME] [--isa LEVEL] [--seed N]
//         [--slack BYTES] [--list]
//
// --cases counts the cases per class of weights (kind, bits, activation mode); 2500 and more is
// the full sweep. --slack: readable bytes behind buffers, for emulators (guarded.h). One line per
// kernel: cases, result, digest of the scalar results of its cases.

#include <unistd.h>

#include <csignal>
#include <cstdarg>
#include <cstdlib>
#include <iostream>

#include "guarded.h"
#include "report.h"

namespace sweep {

char context[512] = "";
const char* running = "";

void Report::fail(const std::string& name, const char* format, ...) {
  Tally& tally = of(name);
  if (++tally.failures > 5) return;
  char text[400];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  std::fprintf(stderr, "FAILED %s: %s\n  in %s\n", name.c_str(), text, context);
}

std::vector<Row> Report::rows(const char* op) const {
  std::vector<Row> rows;
  qk_set_isa(options.isa);
  for (int32_t i = 0; i < qk_kernel_count(); ++i) {
    qk_kernel_info info = {};
    info.struct_size = sizeof info;
    qk_kernel_at(i, &info);
    if (!info.usable || std::strcmp(info.op, op) != 0) continue;
    if (wants(info.name)) rows.push_back({info.name, info.op, info.isa});
  }
  return rows;
}

int Report::finish() const {
  int64_t cases = 0, failures = 0;
  Digest all;
  std::printf("%-36s %9s  %-8s %s\n", "kernel", "cases", "result", "digest of scalar");
  for (const std::string& name : order_) {
    const Tally& t = tallies_.at(name);
    char result[24] = "ok";
    if (t.failures) std::snprintf(result, sizeof result, "%lld BAD", (long long)t.failures);
    std::printf("%-36s %9lld  %-8s %016llx\n", name.c_str(), (long long)t.cases, result,
                (unsigned long long)t.digest.value());
    cases += t.cases;
    failures += t.failures;
    if (name.find("scalar") != std::string::npos) {
      all.add((uint32_t)t.digest.value());
      all.add((uint32_t)(t.digest.value() >> 32));
    }
  }
  std::printf("%-36s %9lld  %-8s %016llx\n", "total", (long long)cases, failures ? "BAD" : "ok",
              (unsigned long long)all.value());
  if (cases == 0) std::fprintf(stderr, "no kernel was asked for that this machine can run\n");
  return failures || cases == 0 ? 1 : 0;
}

}  // namespace sweep

namespace {

// Says what ran, with nothing but write: the state of the library is unknown.
extern "C" void on_fault(int signal) {
  const char* what = signal == SIGILL   ? "\nILLEGAL INSTRUCTION in "
                     : signal == SIGFPE ? "\nARITHMETIC FAULT in "
                                        : "\nMEMORY FAULT in ";
  const char* const parts[] = {what, sweep::running, ", ", sweep::context, "\n"};
  for (const char* text : parts)
    if (write(2, text, std::strlen(text)) < 0) break;
  _exit(3);
}

[[noreturn]] void usage(const char* why) {
  std::fprintf(
      stderr,
      "sweep: %s\nusage: sweep [--cases N] [--kernel NAME] [--skip NAME] [--isa LEVEL] [--seed N] "
      "[--slack BYTES] [--list]\n",
      why);
  std::exit(2);
}

qk_isa level_named(const char* name) {
  for (qk_isa isa = 0; isa < 64; ++isa)
    if (const char* known = qk_isa_name(isa))
      if (std::strcmp(known, name) == 0) return isa;
  usage("no instruction set has this name");
}

int list() {
  for (int32_t i = 0; i < qk_kernel_count(); ++i) {
    qk_kernel_info info = {};
    info.struct_size = sizeof info;
    qk_kernel_at(i, &info);
    std::printf("%-36s %-22s %-22s %s\n", info.name, info.weights, info.activations,
                info.usable ? "usable" : "not on this machine");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  sweep::Options options;
  bool only_list = false;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--list") {
      only_list = true;
      continue;
    }
    if (i + 1 == argc) usage("a flag wants a value");
    const char* value = argv[++i];
    if (flag == "--cases")
      options.cases = std::atoll(value);
    else if (flag == "--seed")
      options.seed = (uint64_t)std::atoll(value);
    else if (flag == "--kernel")
      options.kernel = value;
    else if (flag == "--skip")
      options.skip = value;
    else if (flag == "--slack")
      sweep::Guarded::slack = std::atoll(value);
    else if (flag == "--isa")
      options.isa = level_named(value);
    else
      usage("unknown flag");
  }
  if (options.cases < 1) usage("--cases must be at least 1");
  if (qk_set_isa(options.isa) != QK_OK) usage(qk_last_error());
  if (only_list) return list();
  std::signal(SIGSEGV, on_fault);
  std::signal(SIGBUS, on_fault);
  std::signal(SIGILL, on_fault);
  std::signal(SIGFPE, on_fault);
  std::printf("qkern %s, detected %s, in force %s, %lld cases per class, seed %llu\n", qk_version(),
              qk_isa_name(qk_detected_isa()), qk_isa_name(qk_active_isa()),
              (long long)options.cases, (unsigned long long)options.seed);
  sweep::Report report(options);
  sweep::sweep_linear(report);
  sweep::sweep_quantize(report);
  sweep::sweep_convert(report);
  sweep::sweep_dequantize(report);
  sweep::sweep_matmul(report);
  sweep::sweep_storage(report);
  sweep::sweep_codes(report);
  sweep::sweep_fit(report);
  sweep::sweep_header(report);
  return report.finish();
}
