// SPDX-License-Identifier: Apache-2.0
// Four numbers of F32, F16 or BF16 as float32, and back. Armv8.0 converts float16 in one
// instruction; bfloat16 is rounded in integers.
#pragma once

#if !defined(__aarch64__)
#error "this header is for aarch64"
#endif

#include <arm_neon.h>

#include "../numeric.h"

namespace qkern {
namespace {

inline float32x4_t bf16_to_f32x4(uint16x4_t v) { return vreinterpretq_f32_u32(vshll_n_u16(v, 16)); }

// Elements i .. i+3.
inline float32x4_t load_f32x4(const void* data, qk_dtype dtype, int64_t i) {
  if (dtype == QK_F32) return vld1q_f32(static_cast<const float*>(data) + i);
  const uint16x4_t v = vld1_u16(static_cast<const uint16_t*>(data) + i);
  return dtype == QK_F16 ? vcvt_f32_f16(vreinterpret_f16_u16(v)) : bf16_to_f32x4(v);
}

// The first `count` < 4 elements from i on, then zeros.
inline float32x4_t load_some_f32x4(const void* data, qk_dtype dtype, int64_t i, int64_t count) {
  uint64_t room[2] = {0, 0};
  const int size = dtype == QK_F32 ? 4 : 2;
  memcpy(room, static_cast<const uint8_t*>(data) + i * size, (size_t)(count * size));
  return load_f32x4(room, dtype, 0);
}

// Half to even; NaN keeps its upper payload and becomes quiet.
inline uint16x4_t f32_to_bf16x4(float32x4_t v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
}

// Elements i .. i+3 of an array of F32, F16 or BF16.
inline void store_f32x4(void* data, qk_dtype dtype, int64_t i, float32x4_t v) {
  if (dtype == QK_F32) return vst1q_f32(static_cast<float*>(data) + i, v);
  vst1_u16(static_cast<uint16_t*>(data) + i,
           dtype == QK_F16 ? vreinterpret_u16_f16(vcvt_f16_f32(v)) : f32_to_bf16x4(v));
}

inline void store_some_f32x4(void* data, qk_dtype dtype, int64_t i, int64_t count, float32x4_t v) {
  uint64_t room[2];
  const int size = dtype == QK_F32 ? 4 : 2;
  store_f32x4(room, dtype, 0, v);
  memcpy(static_cast<uint8_t*>(data) + i * size, room, (size_t)(count * size));
}

}  // namespace
}  // namespace qkern
