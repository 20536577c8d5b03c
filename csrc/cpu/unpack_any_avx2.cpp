// SPDX-License-Identifier: Apache-2.0
// Codes of the packed layout, one byte each, rows dense: all widths, both kinds of lanes.
//
// Planes are joined 32 bytes at a time. Row lanes then are 16 columns of two outputs as they should
// lie. Of dword lanes four registers, four columns each, are turned around: a 4 x 4 transposition
// of dwords gives 16 columns of an output per 16-byte lane.

#include <immintrin.h>

#include "kernels.h"

namespace qkern {
namespace {

inline __m256i load(const uint8_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

// Adds plane kPlane (if codes of kBits bits have it) to step `s` of a unit; `at` goes on to the
// next plane. A step is as many columns as a lane has bytes.
template <int kBits, int kPlane, int kBlockBytes>
inline void add_plane(const uint8_t*& at, int s, int& shift, __m256i& codes) {
  if constexpr ((kBits & kPlane) != 0) {
    constexpr int kLast = kBits & -kBits, kFields = 8 / kPlane;
    const __m256i bytes = load(at + s / kFields * kBlockBytes);
    __m256i field = kPlane == 8 ? bytes
                                : _mm256_and_si256(_mm256_srli_epi16(bytes, s % kFields * kPlane),
                                                   _mm256_set1_epi8((1 << (kPlane & 7)) - 1));
    if (shift) field = _mm256_slli_epi16(field, shift);
    codes = shift ? _mm256_or_si256(codes, field) : field;
    shift += kPlane;
    at += kPlane / kLast * kBlockBytes;
  }
}

template <int kBits, int kBlockBytes>
inline __m256i codes_of_step(const uint8_t* at, int s) {
  __m256i codes = _mm256_setzero_si256();
  int shift = 0;
  add_plane<kBits, 8, kBlockBytes>(at, s, shift, codes);
  add_plane<kBits, 4, kBlockBytes>(at, s, shift, codes);
  add_plane<kBits, 2, kBlockBytes>(at, s, shift, codes);
  add_plane<kBits, 1, kBlockBytes>(at, s, shift, codes);
  return codes;
}

template <int kBits>
constexpr int kSteps = 8 / (kBits & -kBits);  // of a unit

// One half: where its units lie, and where its rows go.
struct Half {
  const uint8_t* units;
  int64_t unit_stride;
  int64_t columns;
  uint8_t* out;
  int64_t stride;
};

inline void store_row(uint8_t* to, __m128i row) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), row);
}

template <int kBits>
void unpack_rows(const Half& h) {
  const uint8_t* unit = h.units;
  for (int64_t k = 0; k < h.columns; unit += h.unit_stride)
#pragma GCC unroll 8
    for (int s = 0; s < kSteps<kBits>; ++s, k += 16)
      for (int i = 0; i < 8; ++i) {
        // Register i % 2 of vector i / 2: rows 8 * (i % 2) + i / 2 and 4 more.
        const __m256i codes = codes_of_step<kBits, 256>(unit + 32 * i, s);
        uint8_t* to = h.out + (8 * (i % 2) + i / 2) * h.stride + k;
        store_row(to, _mm256_castsi256_si128(codes));
        store_row(to + 4 * h.stride, _mm256_extracti128_si256(codes, 1));
      }
}

// Columns 4s .. 4s + 3 of eight outputs in register s: stores 16 columns of each.
inline void store_transposed(const __m256i (&v)[4], uint8_t* to, int64_t stride) {
  const __m256i low01 = _mm256_unpacklo_epi32(v[0], v[1]);
  const __m256i low23 = _mm256_unpacklo_epi32(v[2], v[3]);
  const __m256i high01 = _mm256_unpackhi_epi32(v[0], v[1]);
  const __m256i high23 = _mm256_unpackhi_epi32(v[2], v[3]);
  const __m256i rows[4] = {_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
                           _mm256_unpacklo_epi64(high01, high23),
                           _mm256_unpackhi_epi64(high01, high23)};
  for (int r = 0; r < 4; ++r) {
    store_row(to + r * stride, _mm256_castsi256_si128(rows[r]));
    store_row(to + (4 + r) * stride, _mm256_extracti128_si256(rows[r], 1));
  }
}

template <int kBits>
void unpack_dwords(const Half& h) {
  constexpr int kUnit = 4 * kSteps<kBits>, kAtOnce = kUnit < 16 ? 16 : kUnit;
  int64_t k = 0;
  for (; k + kAtOnce <= h.columns; k += kAtOnce) {
    const uint8_t* unit = h.units + k / kUnit * h.unit_stride;
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
      for (int first = 0; first < kAtOnce; first += 16) {
        __m256i v[4];
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) {
          const int column = first + 4 * s;
          v[s] = codes_of_step<kBits, 64>(unit + column / kUnit * h.unit_stride + 32 * i,
                                          column % kUnit / 4);
        }
        store_transposed(v, h.out + 8 * i * h.stride + k + first, h.stride);
      }
  }
  for (; k < h.columns; k += 4) {
    alignas(32) uint32_t fours[16];
    for (int i = 0; i < 2; ++i)
      _mm256_store_si256(reinterpret_cast<__m256i*>(fours + 8 * i),
                         codes_of_step<kBits, 64>(h.units + k / kUnit * h.unit_stride + 32 * i,
                                                  (int)(k % kUnit) / 4));
    for (int r = 0; r < kHalf; ++r) memcpy(h.out + r * h.stride + k, &fours[r], 4);
  }
}

template <int kBits>
void unpack(const Packed& w, const Half& h) {
  if (w.lanes == Lanes::kRow)
    unpack_rows<kBits>(h);
  else
    unpack_dwords<kBits>(h);
}

}  // namespace

void unpack_any_avx2(const Packed& w, const uint8_t* group_codes, int half, int halves, int64_t k0,
                     int64_t columns, uint8_t* out, int64_t out_stride) {
  using Unpack = void (*)(const Packed&, const Half&);
  static constexpr Unpack kUnpack[8] = {unpack<1>, unpack<2>, unpack<3>, unpack<4>,
                                        unpack<5>, unpack<6>, unpack<7>, unpack<8>};
  const int64_t unit_bytes = (int64_t)w.unit * kHalf * w.h.bits / 8;
  const Half h = {group_codes + (k0 / w.unit * halves + half) * unit_bytes, unit_bytes * halves,
                  columns, out, out_stride};
  kUnpack[w.h.bits - 1](w, h);
}

}  // namespace qkern
