// SPDX-License-Identifier: Apache-2.0
// A half (sixteen outputs) as four registers of four floats: its scales and zeros, the end of a
// chunk, the end of a row. Every rounding of the contract after the sums happens here.
#pragma once

#include "../kernels.h"
#include "rows_neon.h"

namespace qkern {
namespace {

struct Half {
  float32x4_t v[4];
};

// A line that gcc's scheduler does not move instructions across: it would gather the loads of a
// whole loop body at its top and run out of registers.
__attribute__((always_inline)) inline void schedule_apart() { asm volatile("" ::); }

template <int I>
struct Index {
  constexpr operator int() const { return I; }
};

// fn(Index<0>) .. fn(Index<N - 1>) without a loop: arrays of accumulators stay in registers only
// where every index is a constant, and shifts and lanes must be constants.
template <int N, class Fn>
__attribute__((always_inline)) inline void repeat(const Fn& fn) {
  if constexpr (N > 0) {
    repeat<N - 1>(fn);
    fn(Index<N - 1>());
  }
}

inline Half bytes_to_dwords(const uint8_t* at, uint32x4_t d[4]) {
  const uint8x16_t bytes = vld1q_u8(at);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
  d[0] = vmovl_u16(vget_low_u16(low));
  d[1] = vmovl_high_u16(low);
  d[2] = vmovl_u16(vget_low_u16(high));
  d[3] = vmovl_high_u16(high);
  return {{vcvtq_f32_u32(d[0]), vcvtq_f32_u32(d[1]), vcvtq_f32_u32(d[2]), vcvtq_f32_u32(d[3])}};
}

// E4M3 lies inside float16 with another bias; subnormals convert exactly.
inline float32x4_t e4m3_to_f32x4(uint32x4_t dwords) {
  const uint16x4_t words = vmovn_u32(dwords);
  const uint16x4_t magnitude = vshl_n_u16(vand_u16(words, vdup_n_u16(0x7f)), 7);
  const uint16x4_t sign = vshl_n_u16(vand_u16(words, vdup_n_u16(0x80)), 8);
  return vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(vorr_u16(magnitude, sign))), 256.f);
}

// Sixteen values of a stored dtype, exactly.
inline Half load_half(const uint8_t* at, qk_dtype dtype) {
  Half h;
  if (dtype == QK_F32 || dtype == QK_F16 || dtype == QK_BF16) {
    for (int i = 0; i < 4; ++i) h.v[i] = load_f32x4(at, dtype, 4 * i);
    return h;
  }
  uint32x4_t dwords[4];
  h = bytes_to_dwords(at, dwords);
  if (dtype == QK_U8) return h;
  for (int i = 0; i < 4; ++i)
    h.v[i] =
        dtype == QK_E4M3
            ? e4m3_to_f32x4(dwords[i])
            // E8M0 is the exponent of a float; byte 0 is the subnormal 2^-127.
            : vreinterpretq_f32_u32(vmaxq_u32(vshlq_n_u32(dwords[i], 23), vdupq_n_u32(0x00400000)));
  return h;
}

// What a group says about one half: read once per chunk, used for all rows.
struct GroupScales {
  Half scale, zero;
  bool asymmetric;
};

inline GroupScales load_scales(const Packed& w, const uint8_t* block, int64_t g, int halves,
                               int half) {
  GroupScales s;
  const float32x4_t one = vdupq_n_f32(1.f);
  s.scale = {{one, one, one, one}};
  if (w.scale_bytes)
    s.scale = load_half(w.scales_of(block, g, halves) + half * w.scale_bytes, w.h.scale_stored);
  s.asymmetric = w.zero_bytes != 0;
  s.zero = s.scale;
  if (s.asymmetric)
    s.zero = load_half(w.zeros_of(block, g, halves) + half * w.zero_bytes, w.h.zero_stored);
  return s;
}

// acc += (sum - zero * X) * scale for one row of a half.
inline void add_chunk(const GroupScales& s, Half sum, float x_sum, float factor, float* acc) {
  for (int i = 0; i < 4; ++i) {
    float32x4_t t = sum.v[i];
    if (s.asymmetric) t = vfmsq_f32(t, s.zero.v[i], vdupq_n_f32(x_sum));
    // The factor is the table scale, or the scale of a group of activations; 1 changes no bit.
    const float32x4_t scale = vmulq_n_f32(s.scale.v[i], factor);
    vst1q_f32(acc + 4 * i, vfmaq_f32(vld1q_f32(acc + 4 * i), t, scale));
  }
}

// The end of row m of a half whose first output is n0: activation scale, bias, output dtype.
inline void finish_half(const LinearJob& job, const float* acc, int64_t m, int64_t n0) {
  const bool scaled = job.w->h.activations == QK_ACT_INT8;
  const float32x4_t x_scale = vdupq_n_f32(scaled ? job.q_scale[m] : 1.f);
  for (int64_t n = n0; n < min64(n0 + kHalf, job.w->h.n); n += 4) {
    const int64_t count = job.w->h.n - n, at = m * job.y_stride + n;
    float32x4_t v = vld1q_f32(acc + (n - n0));
    // With the factor 1 the fused step is the plain addition of the other modes.
    if (job.bias)
      v = vfmaq_f32(count >= 4 ? load_f32x4(job.bias, QK_F32, n)
                               : load_some_f32x4(job.bias, QK_F32, n, count),
                    v, x_scale);
    else if (scaled)
      v = vmulq_f32(v, x_scale);
    if (count >= 4)
      store_f32x4(job.y, job.y_dtype, at, v);
    else
      store_some_f32x4(job.y, job.y_dtype, at, count, v);
  }
}

}  // namespace
}  // namespace qkern
