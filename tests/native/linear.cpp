// SPDX-License-Identifier: Apache-2.0
#include "linear.h"

#include <algorithm>

#include "registers.h"

namespace sweep {

void Scattered::run(void*, int64_t tasks, qk_task fn, void* arg) {
  for (int64_t t = tasks - 1; t >= 0; t -= 2) fn(arg, t);
  for (int64_t t = tasks - 2; t >= 0; t -= 2) fn(arg, t);
}

std::string LinearCall::describe() const {
  char text[160];
  std::snprintf(text, sizeof text,
                "m %lld dtypes %d%d%d layout %d y_gap %lld threads %d%s%s%s misplaced %lld",
                (long long)m, x_dtype, bias_dtype, y_dtype, (int)lay, (long long)y_gap, threads,
                bias ? " bias" : "", special ? " special" : "", own_scratch ? " workspace" : "",
                (long long)misplaced);
  return text;
}

LinearProblem::LinearProblem(const Weight& weight, const LinearCall& call, Random& random)
    : weight_(weight), call_(call) {
  x_.place(call.x_dtype, call.m, weight.k(), call.lay, random);
  fill(random);
  x_.memory().lock();
  if (call.bias) {
    const Flush flush = call.misplaced || random.one_in(2) ? Flush::kBegin : Flush::kEnd;
    bias_.place(weight.n() * size_of(call.bias_dtype), flush, 1, call.misplaced);
    for (int64_t i = 0; i < weight.n(); ++i)
      encode(call.bias_dtype, bias_.data(), i,
             weight.exact() ? (double)random.between(-9, 9) : 3 * random.symmetric());
    bias_.lock();
  }
  out_at_end_ = !call.misplaced && random.one_in(2);
  workspace_at_end_ = random.one_in(2);
}

int64_t LinearProblem::activation_group() const {
  if (weight_.weight().activations == QK_ACT_INT8) return weight_.k();
  return weight_.groups() > 1 ? weight_.group() : 128;
}

void LinearProblem::fill(Random& random) {
  const int64_t k = weight_.k();
  const bool int8 = weight_.weight().activations != QK_ACT_FLOAT;
  const int64_t distinct = call_.lay == Lay::kSameRow ? 1 : call_.m;
  for (int64_t m = 0; m < distinct; ++m) {
    const double loud = random.one_in(4) ? std::ldexp(1.0, (int)random.between(-12, 12)) : 1;
    for (int64_t c = 0; c < k; ++c) {
      const int64_t reach = int8 ? 127 : 3;
      x_.set(m, c,
             weight_.exact() ? (double)random.between(-reach, reach) : loud * random.symmetric());
    }
    // With 127 in every activation group the scale is 1 and small integers stay as they are.
    if (weight_.exact() && int8 && call_.lay != Lay::kSameColumn)
      for (int64_t c = 0; c < k; c += activation_group())
        x_.set(m, weight_.input_column(c), random.one_in(2) ? 127 : -127);
    if (weight_.exact() && int8 && call_.lay == Lay::kSameColumn) x_.set(m, 0, 127);
    if (call_.special && random.one_in(2)) {
      static const double specials[] = {NAN, INFINITY, -INFINITY, -0.0, 1e-41, -1e-6, 0.0};
      for (int times = 0; times < 3; ++times) {
        const int64_t place = random.below(k);
        x_.set(m, place, random.pick(specials));
      }
    } else if (call_.special) {
      for (int64_t c = 0; c < k; ++c) x_.set(m, c, random.one_in(2) ? 0.0 : -0.0);
    }
  }
}

qk_status LinearProblem::run(const char* kernel, Report& report, const std::string& name) {
  running = kernel;
  const int64_t n = weight_.n(), stride = n + call_.y_gap;
  const int size = size_of(call_.y_dtype);
  const int64_t bytes = ((call_.m - 1) * stride + n) * size;
  uint8_t* y = out_.place(bytes, out_at_end_ ? Flush::kEnd : Flush::kBegin, 1, call_.misplaced);
  const Scattered scattered(call_.threads);
  qk_linear_args args = {};
  args.struct_size = sizeof args;
  args.x_dtype = call_.x_dtype;
  args.packed = weight_.packed().data();
  args.packed_bytes = weight_.packed().bytes();
  args.x = x_.base();
  args.m = call_.m;
  args.x_row_stride = x_.row_stride();
  args.x_col_stride = x_.column_stride();
  args.bias = call_.bias ? bias_.data() : nullptr;
  args.bias_dtype = call_.bias_dtype;
  args.y_dtype = call_.y_dtype;
  args.y = y;
  args.y_row_stride = stride;
  args.kernel = kernel;
  args.parallel = call_.threads ? scattered.get() : nullptr;
  if (call_.own_scratch) {
    int64_t scratch = 0;
    if (qk_status s = qk_linear_workspace(&args, &scratch)) return s;
    args.workspace =
        workspace_.place(scratch, workspace_at_end_ ? Flush::kEnd : Flush::kBegin, 64, 0, 0xff);
    args.workspace_bytes = scratch;
  }
  clean_registers();
  if (qk_status s = qk_linear(&args)) return s;
  report.check(name, registers_clean(), "left vector or tile registers in use");
  report.check(name, out_.intact(), "wrote outside y");
  report.check(name, !call_.own_scratch || workspace_.intact(), "wrote outside the workspace");
  report.check(name, std::strcmp(qk_last_kernel(), name.c_str()) == 0, "another kernel ran");
  y_.resize((size_t)(call_.m * n * size));
  bool gaps = true;
  for (int64_t m = 0; m < call_.m; ++m) {
    std::memcpy(y_.data() + m * n * size, y + m * stride * size, (size_t)(n * size));
    for (int64_t i = n * size; m + 1 < call_.m && i < stride * size; ++i)
      gaps = gaps && y[m * stride * size + i] == 0xa5;
  }
  report.check(name, gaps, "wrote between rows of y");
  return QK_OK;
}

qk_status LinearProblem::run_row(int64_t m, std::vector<uint8_t>* y) {
  std::vector<float> row((size_t)weight_.k());
  for (int64_t k = 0; k < weight_.k(); ++k) row[(size_t)k] = (float)x_.get(m, k);
  y->resize((size_t)(weight_.n() * size_of(call_.y_dtype)));
  qk_linear_args args = {};
  args.struct_size = sizeof args;
  args.x_dtype = QK_F32;
  args.packed = weight_.packed().data();
  args.packed_bytes = weight_.packed().bytes();
  args.x = row.data();
  args.m = 1;
  args.x_row_stride = weight_.k();
  args.x_col_stride = 1;
  args.bias = call_.bias ? bias_.data() : nullptr;
  args.bias_dtype = call_.bias_dtype;
  args.y_dtype = call_.y_dtype;
  args.y = y->data();
  args.y_row_stride = weight_.n();
  return qk_linear(&args);
}

// The activations of a row in stored column order, as the kernels multiply them: quantized and
// scaled back where the weight asks for int8.
std::vector<double> LinearProblem::stored_row(int64_t m) const {
  const int64_t k = weight_.k();
  std::vector<double> x((size_t)k);
  for (int64_t c = 0; c < k; ++c) x[(size_t)c] = x_.get(m, weight_.input_column(c));
  if (weight_.weight().activations == QK_ACT_FLOAT) return x;
  const int64_t group = activation_group();
  for (int64_t begin = 0; begin < k; begin += group) {
    const int64_t end = std::min(k, begin + group);
    std::vector<int8_t> codes((size_t)(end - begin));
    const float scale = quantize_group({x.begin() + begin, x.begin() + end}, codes.data());
    for (int64_t c = begin; c < end; ++c)
      x[(size_t)c] = (double)codes[(size_t)(c - begin)] * (double)scale;
  }
  return x;
}

void LinearProblem::add_products(int64_t m, std::vector<double>* sum,
                                 std::vector<double>* magnitude) const {
  const std::vector<double> x = stored_row(m);
  const double table_scale = weight_.weight().table_scale;
  for (int64_t n = 0; n < weight_.n(); ++n) {
    double total = 0, size = 0;
    for (int64_t k = 0; k < weight_.k(); ++k) {
      const double factor = x[(size_t)k] * weight_.scale(n, k) * table_scale;
      const double v = weight_.value(n, k), zero = weight_.zero(n, k);
      total += factor * (v - zero);
      size += std::fabs(factor) * (std::fabs(v) + std::fabs(zero));
    }
    const double bias = call_.bias ? decode(call_.bias_dtype, bias_.data(), n) : 0;
    (*sum)[(size_t)n] = total + bias;
    (*magnitude)[(size_t)n] = size + std::fabs(bias);
  }
}

// Every product passes through at most K + G + 20 roundings of relative error 2^-24, and the
// result through one of the dtype of y (2^-11, 2^-8, or absolute among subnormals). Where all terms
// are multiples of 2^-4 (exact weights) and their magnitudes sum to less than 2^20, no operation
// rounds and the result is the true one, rounded once.
bool LinearProblem::matches_oracle(const std::vector<uint8_t>& y, std::string* why) const {
  const int64_t n = weight_.n(), roundings = weight_.k() + weight_.groups() + 20;
  const bool half = call_.y_dtype == QK_F16, brain = call_.y_dtype == QK_BF16;
  std::vector<double> sum((size_t)n), magnitude((size_t)n);
  for (int64_t m = 0; m < call_.m; ++m) {
    add_products(m, &sum, &magnitude);
    for (int64_t i = 0; i < n; ++i) {
      const double got = decode(call_.y_dtype, y.data(), m * n + i);
      const double expected = sum[(size_t)i], size = magnitude[(size_t)i];
      double bound = std::ldexp((double)roundings * size, -24) + 1e-37;
      bool good;
      if (std::isnan(expected) || std::isinf(expected)) {
        good = !std::isfinite(got);
      } else if (weight_.exact() && !call_.special && size < (1 << 20)) {
        uint32_t once = 0;
        encode(call_.y_dtype, &once, 0, expected);
        good = got == decode(call_.y_dtype, &once, 0);
        bound = 0;
      } else {
        if (half) bound += std::ldexp(std::fabs(expected) + bound, -11) + std::ldexp(1.0, -25);
        if (brain) bound += std::ldexp(std::fabs(expected) + bound, -8);
        const bool overflow = std::fabs(expected) + bound > (half ? 65504 : 3e38);
        good = overflow || std::fabs(got - expected) <= bound;
      }
      if (good) continue;
      char text[160];
      std::snprintf(text, sizeof text, "row %lld output %lld is %.9g, true value %.9g, bound %.3g",
                    (long long)m, (long long)i, got, expected, bound);
      *why = text;
      return false;
    }
  }
  return true;
}

}  // namespace sweep
