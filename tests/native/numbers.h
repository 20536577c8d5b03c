// SPDX-License-Identifier: Apache-2.0
// Numbers of the tests: their own decoders and encoders, written apart from the library's and by
// other means (ldexp instead of bits), and random values that are the same on every machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "qkern/qkern.h"

namespace sweep {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_half(qk_dtype d) { return d == QK_F16 || d == QK_BF16; }

inline int size_of(qk_dtype d) { return d == QK_F32 || d == QK_I32 ? 4 : is_half(d) ? 2 : 1; }

// splitmix64: integers only, so that every machine draws the same. Never two draws in the arguments
// of one call: compilers differ in which comes first.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return (int64_t)(next() >> 1) % n; }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool one_in(int n) { return below(n) == 0; }
  // Uniform in (-1, 1), a float with 20 significant bits.
  double symmetric() { return (double)(below(1 << 21) - (1 << 20)) / (1 << 20); }
  template <class T, size_t count>
  T pick(const T (&from)[count]) {
    return from[below((int64_t)count)];
  }

 private:
  uint64_t state_;
};

// A sign, an exponent field and a mantissa field to their value; `bias` as in IEEE 754.
inline double assemble(bool negative, int exponent, int mantissa, int mantissa_bits, int bias) {
  const double fraction = std::ldexp((double)mantissa, -mantissa_bits);
  const double value =
      exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1.0 + fraction, exponent - bias);
  return negative ? -value : value;
}

inline double decode(qk_dtype dtype, const void* data, int64_t i) {
  const uint8_t* at = static_cast<const uint8_t*>(data) + i * size_of(dtype);
  if (dtype == QK_F32) {
    float v;
    std::memcpy(&v, at, 4);
    return v;
  }
  if (dtype == QK_U8) return *at;
  if (dtype == QK_I8) return (int8_t)*at;
  if (dtype == QK_E8M0) return *at == 255 ? NAN : std::ldexp(1.0, *at - 127);
  if (dtype == QK_E4M3)
    return (*at & 127) == 127 ? NAN : assemble(*at >> 7, *at >> 3 & 15, *at & 7, 3, 7);
  uint16_t h;
  std::memcpy(&h, at, 2);
  const int mantissa_bits = dtype == QK_F16 ? 10 : 7, most = dtype == QK_F16 ? 31 : 255;
  const int exponent = h >> mantissa_bits & most, mantissa = h & ((1 << mantissa_bits) - 1);
  if (exponent == most) return mantissa ? NAN : h >> 15 ? -INFINITY : INFINITY;
  return assemble(h >> 15, exponent, mantissa, mantissa_bits, dtype == QK_F16 ? 15 : 127);
}

// Half to even into a 16-bit float.
inline uint16_t encode_half(qk_dtype dtype, double value) {
  const int mantissa_bits = dtype == QK_F16 ? 10 : 7, bias = dtype == QK_F16 ? 15 : 127;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const uint16_t infinity = dtype == QK_F16 ? 0x7c00 : 0x7f80;
  if (std::isnan(value)) return (uint16_t)(sign | infinity | 1 << (mantissa_bits - 1));
  const double magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  if (std::isinf(value)) return sign | infinity;
  const int exponent = std::ilogb(magnitude) < 1 - bias ? 1 - bias : std::ilogb(magnitude);
  if (exponent > bias) return sign | infinity;
  const double steps = std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent));
  const int64_t bits = ((int64_t)(exponent + bias - 1) << mantissa_bits) + (int64_t)steps;
  return (uint16_t)(sign | (bits > infinity ? infinity : bits));
}

inline void encode(qk_dtype dtype, void* data, int64_t i, double value) {
  uint8_t* at = static_cast<uint8_t*>(data) + i * size_of(dtype);
  if (dtype == QK_F32) {
    const float v = (float)value;
    std::memcpy(at, &v, 4);
  } else if (is_half(dtype)) {
    const uint16_t h = encode_half(dtype, value);
    std::memcpy(at, &h, 2);
  } else {
    *at = (uint8_t)(int)value;
  }
}

// The bits of an element with all NaNs made one, so that results compare and digest alike.
inline uint32_t canonical_bits(qk_dtype dtype, const void* data, int64_t i) {
  if (std::isnan(decode(dtype, data, i))) return 0x7fc00000u;
  uint32_t bits = 0;
  std::memcpy(&bits, static_cast<const uint8_t*>(data) + i * size_of(dtype),
              (size_t)size_of(dtype));
  return bits;
}

// FNV-1a over 32-bit words.
class Digest {
 public:
  void add(uint32_t word) { value_ = (value_ ^ word) * 0x100000001b3u; }
  void add(qk_dtype dtype, const void* data, int64_t count) {
    for (int64_t i = 0; i < count; ++i) add(canonical_bits(dtype, data, i));
  }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325u;
};

}  // namespace sweep
