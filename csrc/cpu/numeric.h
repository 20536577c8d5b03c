// SPDX-License-Identifier: Apache-2.0
// Numbers: half and brain floats, small helpers. Everything is static so that a copy compiled for
// one instruction set can never be linked in place of another's.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "qkern/qkern.h"

namespace qkern {

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

static inline uint32_t float_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
static inline float bits_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline float bf16_to_float(uint16_t h) { return bits_float((uint32_t)h << 16); }

// Half to even; NaN stays NaN (quiet), as torch does.
static inline uint16_t float_to_bf16(float f) {
  uint32_t u = float_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float f16_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
  uint32_t exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    float magnitude = (float)mantissa * 5.9604644775390625e-8f;  // 2^-24, exact
    return bits_float(sign | float_bits(magnitude));
  }
  return bits_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

// Half to even, overflow to infinity, subnormals kept.
static inline uint16_t float_to_f16(float f) {
  uint32_t u = float_bits(f), sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((u >> 13) & 0x3ffu));
  if (u >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // 65520 and above
  if (u < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24
    float shifted = bits_float(u) + 0.5f;
    return (uint16_t)(sign | (float_bits(shifted) - 0x3f000000u));
  }
  u += 0xc8000fffu + ((u >> 13) & 1u);
  return (uint16_t)(sign | (u >> 13));
}

static inline float e8m0_to_float(uint8_t e) {
  if (e == 255) return bits_float(0x7fc00000u);
  return e == 0 ? bits_float(0x00400000u) : bits_float((uint32_t)e << 23);  // 2^-127 is subnormal
}

static inline float e4m3_to_float(uint8_t v) {
  uint32_t sign = (uint32_t)(v & 0x80u) << 24, exponent = (v >> 3) & 15u, mantissa = v & 7u;
  if (exponent == 15 && mantissa == 7) return bits_float(sign | 0x7fc00000u);
  float magnitude = exponent == 0 ? (float)mantissa * 0.001953125f  // 2^-9
                                  : bits_float(((exponent + 120u) << 23) | (mantissa << 20));
  return bits_float(sign | float_bits(magnitude));
}

static inline int dtype_size(qk_dtype dtype) {
  switch (dtype) {
    case QK_F32:
    case QK_I32:
      return 4;
    case QK_F16:
    case QK_BF16:
      return 2;
    default:
      return 1;
  }
}

// Elements of 2 and 4 bytes wherever they lie: rows of activations may begin at any byte.
static inline uint16_t load_u16(const void* data, int64_t i) {
  uint16_t v;
  memcpy(&v, (const uint8_t*)data + 2 * i, 2);
  return v;
}
static inline uint32_t load_u32(const void* data, int64_t i) {
  uint32_t v;
  memcpy(&v, (const uint8_t*)data + 4 * i, 4);
  return v;
}

// Element i of an array of any of the dtypes above.
static inline float load_float(const void* data, qk_dtype dtype, int64_t i) {
  switch (dtype) {
    case QK_F32:
      return bits_float(load_u32(data, i));
    case QK_F16:
      return f16_to_float(load_u16(data, i));
    case QK_BF16:
      return bf16_to_float(load_u16(data, i));
    case QK_U8:
      return (float)((const uint8_t*)data)[i];
    case QK_I8:
      return (float)((const int8_t*)data)[i];
    case QK_I32:
      return (float)(int32_t)load_u32(data, i);
    case QK_E8M0:
      return e8m0_to_float(((const uint8_t*)data)[i]);
    default:
      return e4m3_to_float(((const uint8_t*)data)[i]);
  }
}

// F32, F16 and BF16 only.
static inline void store_float(void* data, qk_dtype dtype, int64_t i, float value) {
  if (dtype == QK_F32) {
    memcpy((uint8_t*)data + 4 * i, &value, 4);
    return;
  }
  const uint16_t half = dtype == QK_F16 ? float_to_f16(value) : float_to_bf16(value);
  memcpy((uint8_t*)data + 2 * i, &half, 2);
}

}  // namespace qkern
