// SPDX-License-Identifier: Apache-2.0
// c = a . b of int8, exact int32 sums: both operands as int16, vpmaddwd, vpaddd; dense along k.
// (vpmaddubsw would saturate: 2 * 128 * 128 does not fit int16.)
//
// k goes in pieces of kPiece columns, of which four columns of b are widened once for all rows; a
// tile is 6 rows x 4 columns of b, whose lanes are added at the end of a piece. Up to kFewRows rows
// b is widened where it is used.
//
// One core of a Zen 4 server, 4096 x 4096, b a transposed weight: M = 1 / 4 / 16 / 64 in 1.0 / 1.6
// / 5.5 / 17 ms.

#include <immintrin.h>

#include "kernels.h"
#include "simd/fold_avx512.h"
#include "simd/matmul_words.h"

namespace qkern {
namespace {

struct Avx512 {
  // An accumulator of its own vector type: as __m512i gcc 12 keeps copies of it on the stack.
  using Register = int __attribute__((vector_size(64)));
  static constexpr int kStep = 32, kRows = 6, kFewRows = 6;

  static Register zero() { return Register{}; }
  static __m512i widen(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static __m512i load(const int16_t* p) { return _mm512_load_si512(p); }
  static void store(int16_t* p, __m512i v) { _mm512_store_si512(p, v); }
  static Register add_products(Register sum, __m512i a, __m512i b) {
    return sum + (Register)_mm512_madd_epi16(a, b);
  }
  static __m128i fold(const Register (&s)[4]) {
    return fold_dwords({(__m512i)s[0], (__m512i)s[1], (__m512i)s[2], (__m512i)s[3]});
  }
};

}  // namespace

void int8_matmul_avx512(const MatmulJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  multiply_words<Avx512>(job, m0, m1, n0, n1);
}

}  // namespace qkern
