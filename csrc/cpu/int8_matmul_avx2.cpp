// SPDX-License-Identifier: Apache-2.0
// c = a . b of int8, exact int32 sums: both operands as int16, vpmaddwd, vpaddd; dense along k.
// (vpmaddubsw would saturate: 2 * 128 * 128 does not fit int16.)
//
// k goes in pieces of kPiece columns, of which four columns of b are widened once for all rows; a
// tile is 2 rows x 4 columns of b, whose lanes are added at the end of a piece. Up to kFewRows rows
// b is widened where it is used.
//
// One core of a Zen 4 server, 4096 x 4096, b a transposed weight: M = 1 / 4 / 16 / 64 in 1.2 / 2.2
// / 5.9 / 17 ms.

#include <immintrin.h>

#include "kernels.h"
#include "simd/matmul_words.h"

namespace qkern {
namespace {

struct Avx2 {
  // An accumulator of its own vector type: as __m256i it would live in two registers of gcc 12.
  using Register = int __attribute__((vector_size(32)));
  static constexpr int kStep = 16, kRows = 2, kFewRows = 4;

  static Register zero() { return Register{}; }
  static __m256i widen(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static __m256i load(const int16_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store(int16_t* p, __m256i v) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
  static Register add_products(Register sum, __m256i a, __m256i b) {
    return sum + (Register)_mm256_madd_epi16(a, b);
  }
  static __m128i fold(const Register (&s)[4]) {
    const __m256i s01 = _mm256_hadd_epi32((__m256i)s[0], (__m256i)s[1]);
    const __m256i half = _mm256_hadd_epi32(s01, _mm256_hadd_epi32((__m256i)s[2], (__m256i)s[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  }
};

}  // namespace

void int8_matmul_avx2(const MatmulJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  multiply_words<Avx2>(job, m0, m1, n0, n1);
}

}  // namespace qkern
