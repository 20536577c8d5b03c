// SPDX-License-Identifier: Apache-2.0
// Round to nearest on a uniform grid, per row and group of columns.
//
// All arithmetic is float32, every operation rounded half to even:
//   symmetric   scale = fl(max|w| / (2^(b-1) - 1)), rounded to scale_dtype
//               code  = clamp(rint(fl(w / scale)), -2^(b-1), 2^(b-1) - 1) + 2^(b-1)
//   asymmetric  low = min(min w, 0), high = max(max w, 0)
//               scale = fl(fl(high - low) / (2^b - 1)), rounded to scale_dtype
//               zero  = clamp(rint(fl(-low / scale)), 0, 2^b - 1)
//               code  = clamp(rint(fl(w / scale)) + zero, 0, 2^b - 1)
// w / scale is a true division, not a product with 1 / scale; the scale in it is the one after
// rounding to scale_dtype. Whether a scale fits is judged after that rounding too. A group of
// zeros has scale 1 (and zero 0).
//
// Two passes: the first computes every scale and writes nothing, so that a failure leaves the
// outputs as they were; the second computes them again, which costs less than keeping them.
#include "codes.h"
#include "fit_args.h"

namespace qkern {
namespace {

constexpr const char* kCall = "qk_fit_rtn";

// Order-preserving map of finite floats to integers, so that minimum and maximum vectorize; it is
// its own inverse. -0 is one below +0.
inline int32_t ordered(uint32_t bits) {
  const int32_t i = (int32_t)bits;
  return i ^ ((i >> 31) & 0x7fffffff);
}

struct Range {
  float low, high;  // hold 0
  bool finite;
};

Range range_of(const float* w, int64_t count) {
  int32_t low = 0, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t key = ordered(float_bits(w[i]));
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  const uint32_t low_bits = (uint32_t)ordered((uint32_t)low);
  return {bits_float(low_bits), bits_float((uint32_t)high),
          is_finite_bits(low_bits) && is_finite_bits((uint32_t)high)};
}

float rounded_to(qk_dtype dtype, float value) {
  if (dtype == QK_F16) return f16_to_float(float_to_f16(value));
  if (dtype == QK_BF16) return bf16_to_float(float_to_bf16(value));
  return value;
}

// rint(w / scale) for quotients far below 2^22: adding 1.5 * 2^23 leaves the integer, rounded half
// to even, in the low bits.
inline int32_t grid_step(float w, float scale) {
  return (int32_t)float_bits(w / scale + 12582912.0f) - 0x4b400000;
}

struct Grid {
  float scale;
  int32_t zero;  // added to the grid step to give the code
};

class Fit {
 public:
  explicit Fit(const qk_fit_rtn_args& args)
      : a_(args),
        groups_(ceil_div(args.k, args.group)),
        top_((1 << args.bits) - 1),
        smallest_(args.scale_dtype == QK_F16 ? 6.103515625e-5f : 1.17549435e-38f) {}

  int64_t groups() const { return groups_; }
  float smallest() const { return smallest_; }
  const float* group(int64_t row, int64_t g) const {
    return a_.w + row * a_.w_stride + g * a_.group;
  }
  int64_t width(int64_t g) const { return min64(a_.group, a_.k - g * a_.group); }

  Grid grid(const Range& r) const {
    const int32_t half = 1 << (a_.bits - 1);
    const bool zeros = r.low == 0 && r.high == 0;
    if (a_.symmetric) {
      const float most = -r.low > r.high ? -r.low : r.high;
      return {zeros ? 1.0f : rounded_to(a_.scale_dtype, most / (float)(half - 1)), half};
    }
    const float scale = zeros ? 1.0f : rounded_to(a_.scale_dtype, (r.high - r.low) / (float)top_);
    return {scale, fits(scale) ? clamp(grid_step(-r.low, scale)) : 0};
  }

  bool fits(float scale) const { return is_finite_bits(float_bits(scale)) && scale >= smallest_; }

  bool bad_row(int64_t row) const {
    for (int64_t g = 0; g < groups_; ++g) {
      const Range r = range_of(group(row, g), width(g));
      if (!r.finite || !fits(grid(r).scale)) return true;
    }
    return false;
  }

  void write_row(int64_t row) const {
    Grid grid_of_group = {1.0f, 0};
    int64_t known = -1;
    write_codes(
        a_.k, a_.bits, a_.codes + row * a_.codes_stride_bytes,
        [&](int64_t begin, int64_t end, uint8_t* codes) {
          for (int64_t c = begin; c < end;) {
            const int64_t g = c / a_.group, stop = min64(end, (g + 1) * a_.group);
            if (g != known) {
              known = g;
              grid_of_group = grid(range_of(group(row, g), width(g)));
              store_float(a_.scales, a_.scale_dtype, row * groups_ + g, grid_of_group.scale);
              if (!a_.symmetric) a_.zeros[row * groups_ + g] = (uint8_t)grid_of_group.zero;
            }
            encode(grid_of_group, a_.w + row * a_.w_stride + c, stop - c, codes + c - begin);
            c = stop;
          }
        });
  }

 private:
  int32_t clamp(int32_t code) const { return code < 0 ? 0 : code > top_ ? top_ : code; }

  void encode(const Grid& grid, const float* w, int64_t count, uint8_t* codes) const {
    const int32_t top = top_;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t code = grid_step(w[i], grid.scale) + grid.zero;
      const int32_t above = code < 0 ? 0 : code;
      codes[i] = (uint8_t)(above > top ? top : above);
    }
  }

  const qk_fit_rtn_args& a_;
  const int64_t groups_;
  const int32_t top_;
  const float smallest_;
};

qk_status check(qk_fit_rtn_args* a) {
  if (qk_status s = check_bits(kCall, a->bits, 2)) return s;
  if (qk_status s = check_rows(kCall, "w", a->w, a->n, a->k, a->w_stride)) return s;
  if (qk_status s = check_group(kCall, a->k, &a->group)) return s;
  if (a->scale_dtype < QK_F32 || a->scale_dtype > QK_BF16)
    return fail(QK_INVALID_ARGUMENT,
                "%s: scale_dtype must be 0 (float32), 1 (float16) or 2 (bfloat16), got %d", kCall,
                a->scale_dtype);
  if (qk_status s = check_rows(kCall, "codes", a->codes, a->n, stream_bytes(a->k, a->bits),
                               a->codes_stride_bytes))
    return s;
  const bool empty = a->n == 0 || a->k == 0;
  if (!empty && !a->scales) return fail(QK_INVALID_ARGUMENT, "%s: scales is NULL", kCall);
  if (!empty && !a->symmetric && !a->zeros)
    return fail(QK_INVALID_ARGUMENT, "%s: zeros is NULL, but the grid is not symmetric", kCall);
  if (a->symmetric && a->zeros)
    return fail(QK_INVALID_ARGUMENT, "%s: zeros must be NULL where the grid is symmetric", kCall);
  return QK_OK;
}

// The sentence for the first group of `row` that has no scale.
qk_status fail_row(const qk_fit_rtn_args& a, const Fit& fit, int64_t row) {
  for (int64_t g = 0; g < fit.groups(); ++g) {
    const Range r = range_of(fit.group(row, g), fit.width(g));
    if (!r.finite) break;
    const float scale = fit.grid(r).scale;
    if (fit.fits(scale)) continue;
    const char* names[] = {"float32", "float16", "bfloat16"};
    return fail(QK_BAD_FORMAT,
                "%s: the scale of row %lld, group %lld (weights from %g to %g) is %g, which is %s "
                "%s: choose a wider scale_dtype or rescale the weights",
                kCall, (long long)row, (long long)g, (double)r.low, (double)r.high, (double)scale,
                scale < fit.smallest() ? "below the smallest normal" : "not a finite",
                names[a.scale_dtype]);
  }
  return check_numbers(kCall, "w", a.parallel, a.w, a.n, a.k, a.w_stride, true);
}

}  // namespace
}  // namespace qkern

using namespace qkern;

extern "C" qk_status qk_fit_rtn(const qk_fit_rtn_args* args) {
  qk_fit_rtn_args a;
  if (qk_status s = read_struct("qk_fit_rtn_args", args, &a)) return s;
  if (qk_status s = check_parallel(a.parallel)) return s;
  if (qk_status s = check(&a)) return s;
  if (a.n == 0 || a.k == 0) return QK_OK;
  const Fit fit(a);
  const int64_t bad = first_bad_row(a.parallel, a.n, [&](int64_t row) { return fit.bad_row(row); });
  if (bad < a.n) return fail_row(a, fit, bad);
  parallel_for(a.parallel, a.n, [&](int64_t row) { fit.write_row(row); });
  return QK_OK;
}
