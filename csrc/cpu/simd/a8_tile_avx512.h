// SPDX-License-Identifier: Apache-2.0
// The dot product of bytes and the register tile over it: rows of activations times vectors of 16
// outputs, weights as unsigned bytes in dword lanes, int32 sums.
//
// A tile is 6 rows x 2 vectors: 12 int32 sums and, between chunks, 12 float32 sums stay in
// registers, so that the end of a chunk stores nothing. A step is 12 vpdpbusd for 8 loads. Without
// VNNI products go through int16: vpmaddubsw where pair sums of kLargest * 127 fit (several steps
// are added before one vpmaddwd), else even and odd bytes apart through vpmaddwd, which is always
// exact.
#pragma once

#include "a8_codes_avx512.h"

namespace qkern {
namespace {

constexpr int kTileRows = 6;  // of the largest tile; smaller ones serve what is left
constexpr int kVectors = 2;   // of 16 outputs

#if defined(__AVX512VNNI__)

// acc + four products per lane. The one instruction is spelled out because GCC 12 copies every
// accumulator around _mm512_dpbusd_epi32 when there are many of them (2-3 times slower tiles).
template <int kLargest>
inline __m512i dot(__m512i acc, __m512i weights_u8, __m512i x_s8) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights_u8), "v"(x_s8));
  return acc;
}

// Steps whose products one 16-bit sum can hold; 0: products are summed in 32 bits at once.
constexpr int narrow_steps(int) { return 0; }

#else

constexpr int narrow_steps(int largest) { return 32767 / (2 * 127 * largest); }

template <int kLargest>
inline __m512i dot(__m512i acc, __m512i weights_u8, __m512i x_s8) {
  if constexpr (narrow_steps(kLargest) > 0) {
    const __m512i pairs = _mm512_maddubs_epi16(weights_u8, x_s8);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  } else {
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(weights_u8, _mm512_set1_epi16(0xff)),
                                           _mm512_srai_epi16(_mm512_slli_epi16(x_s8, 8), 8));
    const __m512i odd =
        _mm512_madd_epi16(_mm512_srli_epi16(weights_u8, 8), _mm512_srai_epi16(x_s8, 8));
    return _mm512_add_epi32(_mm512_add_epi32(acc, even), odd);
  }
}

#endif

// Activations of a tile, and unsigned bytes of weights: the vectors of step s at
// weights + s * stride.
struct TileInput {
  const int8_t* x;
  int64_t x_stride;
  const uint8_t* weights;
  int64_t stride;
  int64_t steps;  // of 4 columns
  // What each panel of the tile holds next: every step fetches ahead[i] + s * ahead_step, so that
  // memory is read while the tile computes.
  const char* ahead[kVectors];
  int64_t ahead_step;
};

inline __m512i load_x4(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

template <int kPanels>
inline void load_weights(const TileInput& in, int64_t step, __m512i (&weights)[kVectors]) {
#pragma GCC unroll 2
  for (int i = 0; i < kPanels; ++i) _mm_prefetch(in.ahead[i] + step * in.ahead_step, _MM_HINT_T0);
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v)
    weights[v] = _mm512_loadu_si512(in.weights + step * in.stride + 64 * v);
}

// sums[r][v] += products of all steps.
template <int kLargest, int kPanels, int kRows>
inline void sum_tile(const TileInput& in, __m512i (&sums)[kRows][kVectors]) {
  if constexpr (narrow_steps(kLargest) < 2) {
    for (int64_t s = 0; s < in.steps; ++s) {
      __m512i weights[kVectors];
      load_weights<kPanels>(in, s, weights);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512i x = load_x4(in.x + r * in.x_stride + 4 * s);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[r][v] = dot<kLargest>(sums[r][v], weights[v], x);
      }
    }
  } else {
    for (int64_t s0 = 0; s0 < in.steps; s0 += narrow_steps(kLargest)) {
      const int64_t end = min64(in.steps, s0 + narrow_steps(kLargest));
      __m512i pairs[kRows][kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) pairs[r][v] = _mm512_setzero_si512();
      for (int64_t s = s0; s < end; ++s) {
        __m512i weights[kVectors];
        load_weights<kPanels>(in, s, weights);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const __m512i x = load_x4(in.x + r * in.x_stride + 4 * s);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v)
            pairs[r][v] = _mm512_add_epi16(pairs[r][v], _mm512_maddubs_epi16(weights[v], x));
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
          sums[r][v] =
              _mm512_add_epi32(sums[r][v], _mm512_madd_epi16(pairs[r][v], _mm512_set1_epi16(1)));
    }
  }
}

}  // namespace
}  // namespace qkern
