// SPDX-License-Identifier: Apache-2.0
// Packed planes (layout.h) to codes, one byte each, and bytes to what the sums multiply with.
#pragma once

#include "half_avx2.h"

namespace qkern {
namespace {

// One group's worth, or less, of one panel.
struct Piece {
  const uint8_t* codes;   // its first unit
  const uint8_t* tables;  // the tables it uses, as stored, of both halves; NULL for Int
  int halves;
  int64_t columns;
};

// A step is as many columns as a lane has bytes: 4 (dword) or 16 (row).
template <int kBits>
constexpr int kUnitSteps = kBits == 8   ? 1
                           : kBits == 4 ? 2
                           : kBits % 2  ? 8
                                        : 4;

// Plane of kBits bits: the bytes of field i of a byte.
template <int kBits>
inline __m256i field(__m256i bytes, int i) {
  // The shift moves bits of the neighbour byte in; the mask takes them out.
  return _mm256_and_si256(_mm256_srli_epi16(bytes, i * kBits), _mm256_set1_epi8((1 << kBits) - 1));
}

// Codes of step `s` of a unit. `at` is the register's place in the unit's first block.
template <int kBits, int kBlockBytes>
inline __m256i unit_codes(const uint8_t* at, int s) {
  if constexpr (kBits == 8) {
    return load256(at);
  } else if constexpr (kBits == 4 || kBits == 2) {
    return field<kBits>(load256(at), s);
  } else {
    constexpr int kLow = kBits > 4 ? 4 : 2, kHigh = kBits - kLow, kFields = 8 / kLow;
    constexpr int kLowBlocks = kUnitSteps<kBits> / kFields;
    const __m256i low = field<kLow>(load256(at + s / kFields * kBlockBytes), s % kFields);
    const __m256i high = field<kHigh>(load256(at + kLowBlocks * kBlockBytes), s);
    return _mm256_or_si256(low, _mm256_slli_epi16(high, kLow));
  }
}

template <int kBits>
constexpr int kDwordUnitBytes = kUnitSteps<kBits> * 4 * kHalf * kBits / 8;
template <int kBits>
constexpr int kRowUnitBytes = kUnitSteps<kBits> * 16 * kHalf * kBits / 8;

// Memory is asked for this far ahead of the unit that is being unpacked: far enough that the lines
// arrive while a piece is multiplied.
constexpr int64_t kPrefetchBytes = 2048;

inline void prefetch_ahead(const uint8_t* at, int bytes) {
  for (int b = 0; b < bytes; b += (int)kLineBytes) prefetch(at + kPrefetchBytes + b);
}

// Calls use(half, step, register of the half, codes) for all codes of a dword-lane piece, in the
// order of memory.
template <int kBits, class Use>
inline void for_dword_codes(const Piece& p, const Use& use) {
  constexpr int kSteps = kUnitSteps<kBits>;
  const uint8_t* at = p.codes;
  for (int64_t step = 0; step < p.columns / 4; step += kSteps)
    for (int half = 0; half < p.halves; ++half, at += kDwordUnitBytes<kBits>) {
      prefetch_ahead(at, kDwordUnitBytes<kBits>);
      for (int v = 0; v < 2; ++v)
        for (int s = 0; s < kSteps; ++s)
          use(half, step + s, v, unit_codes<kBits, 64>(at + 32 * v, s));
    }
}

// Four registers whose 16-byte lanes are rows, to four whose dwords are rows: dword c of lane l of
// out[d] is dword d of lane l of in[c], which is row 4l + c.
inline void transpose_dwords(const __m256i in[4], __m256i out[4]) {
  const __m256i low01 = _mm256_unpacklo_epi32(in[0], in[1]);
  const __m256i low23 = _mm256_unpacklo_epi32(in[2], in[3]);
  const __m256i high01 = _mm256_unpackhi_epi32(in[0], in[1]);
  const __m256i high23 = _mm256_unpackhi_epi32(in[2], in[3]);
  out[0] = _mm256_unpacklo_epi64(low01, low23);
  out[1] = _mm256_unpackhi_epi64(low01, low23);
  out[2] = _mm256_unpacklo_epi64(high01, high23);
  out[3] = _mm256_unpackhi_epi64(high01, high23);
}

// In each 16-byte lane: byte j of dword r becomes byte r of dword j.
inline __m256i transpose_bytes(__m256i v) {
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(order));
}

// Tables of sixteen floats, one for each 16-byte lane, as four planes of bytes: four vpshufb look
// up the bytes of 32 floats and eight unpacks put them together, 12 shuffles; vpermps, which looks
// up in eight floats only, needs two with two shifts and a blend for every eight.
struct BytePlanes {
  __m256i plane[4];

  BytePlanes(const float* first, const float* second) {
    __m256i four[4];
    for (int i = 0; i < 4; ++i)
      four[i] = transpose_bytes(_mm256_set_m128i(load128(second + 4 * i), load128(first + 4 * i)));
    transpose_dwords(four, plane);
  }

  // Register q: the floats of bytes 4q..4q+3 of both lanes.
  void look_up(__m256i codes, __m256 values[4]) const {
    const __m256i b0 = _mm256_shuffle_epi8(plane[0], codes);
    const __m256i b1 = _mm256_shuffle_epi8(plane[1], codes);
    const __m256i b2 = _mm256_shuffle_epi8(plane[2], codes);
    const __m256i b3 = _mm256_shuffle_epi8(plane[3], codes);
    const __m256i low01 = _mm256_unpacklo_epi8(b0, b1), high01 = _mm256_unpackhi_epi8(b0, b1);
    const __m256i low23 = _mm256_unpacklo_epi8(b2, b3), high23 = _mm256_unpackhi_epi8(b2, b3);
    values[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low01, low23));
    values[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low01, low23));
    values[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(high01, high23));
    values[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(high01, high23));
  }
};

}  // namespace
}  // namespace qkern
