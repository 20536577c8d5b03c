// SPDX-License-Identifier: Apache-2.0
// The machine's limits, as loops that a benchmark can run between its own passes: read bandwidth,
// int8 and float32 multiply-add peaks. Built and called by bench/limits.py.
//
// Instruction loops are assembly on fixed registers: written with intrinsics, gcc 12 copies the
// accumulators and halves the figure. The "tile" loops have the front end's load of a real
// micro-kernel (12 multiply-adds, 6 loads), which on a shared core can fall to half while the pure
// loops do not; a fraction of the limit counts against them.

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define ZERO(i) "vpxord %%zmm" #i ",%%zmm" #i ",%%zmm" #i "\n"
#define TWELVE(OP) OP(0) OP(1) OP(2) OP(3) OP(4) OP(5) OP(6) OP(7) OP(8) OP(9) OP(10) OP(11)
#define CLOBBERED                                                                            \
  "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10",   \
      "zmm11", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm30", "zmm31", "cc", \
      "memory"
#define YZERO(i) "vxorps %%ymm" #i ",%%ymm" #i ",%%ymm" #i "\n"
#define YCLOBBERED                                                                         \
  "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", \
      "ymm11", "ymm12", "ymm13", "ymm14", "ymm15", "cc", "memory"

#define DP(i) "vpdpbusd %%zmm30,%%zmm31,%%zmm" #i "\n"
#define FMA(i) "vfmadd231ps %%zmm30,%%zmm31,%%zmm" #i "\n"
#define YFMA(i) "vfmadd231ps %%ymm14,%%ymm15,%%ymm" #i "\n"
#define LOADS                                                                     \
  "vmovdqa64 (%1),%%zmm16\nvmovdqa64 64(%1),%%zmm17\nvmovdqa64 128(%1),%%zmm18\n" \
  "vmovdqa64 192(%1),%%zmm19\nvpbroadcastd 256(%1),%%zmm20\nvpbroadcastd 260(%1),%%zmm21\n"

static uint8_t block[512] __attribute__((aligned(64)));

// Operands are zero: what a register held before can be numbers so small that they take twice as
// long.
#define LOOP(name, level, zero, a, b, clobbered, body)                                   \
  extern "C" __attribute__((target(level))) void name(int64_t rounds) {                  \
    const uint8_t* memory = block;                                                       \
    asm volatile(TWELVE(zero) zero(a) zero(b) ".p2align 5\n1:\n" body "dec %0\njnz 1b\n" \
                 : "+r"(rounds)                                                          \
                 : "r"(memory)                                                           \
                 : clobbered);                                                           \
  }

// Multiply-adds per round: 12 x 64 int8, 12 x 16 float32, 12 x 8 float32, 4 x 32 int8.
LOOP(int8_avx512vnni, "avx512f", ZERO, 30, 31, CLOBBERED, TWELVE(DP))
LOOP(int8_tile_avx512vnni, "avx512f", ZERO, 30, 31, CLOBBERED, LOADS TWELVE(DP))
LOOP(float_avx512, "avx512f", ZERO, 30, 31, CLOBBERED, TWELVE(FMA))
LOOP(float_tile_avx512, "avx512f", ZERO, 30, 31, CLOBBERED, LOADS TWELVE(FMA))
LOOP(float_avx2, "avx2", YZERO, 14, 15, YCLOBBERED, TWELVE(YFMA))
#define DOT(i, t)                                                                 \
  "vpmaddubsw %%ymm14,%%ymm15,%%ymm" #t "\nvpmaddwd %%ymm14,%%ymm" #t ",%%ymm" #t \
  "\nvpaddd %%ymm" #t ",%%ymm" #i ",%%ymm" #i "\n"
LOOP(int8_avx2, "avx2", YZERO, 14, 15, YCLOBBERED, DOT(0, 4) DOT(1, 5) DOT(2, 6) DOT(3, 7))

// Eight tile products of 16 x 16 x 64 per round on four sums, alone or with the loads that a block
// of two by two tiles needs. The processor has tiles and the system's leave (qkern asked for it).
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static uint8_t tiles[4096] __attribute__((aligned(64)));

#define PRODUCTS                                                 \
  "tdpbusd %%tmm6,%%tmm4,%%tmm0\ntdpbusd %%tmm7,%%tmm4,%%tmm1\n" \
  "tdpbusd %%tmm6,%%tmm5,%%tmm2\ntdpbusd %%tmm7,%%tmm5,%%tmm3\n"
#define TILE_LOADS                                           \
  "tileloadd (%1,%2),%%tmm4\ntileloadd 1024(%1,%2),%%tmm5\n" \
  "tileloadd 2048(%1,%2),%%tmm6\ntileloadd 3072(%1,%2),%%tmm7\n"
#define TILE_LOOP(name, body)                                               \
  extern "C" void name(int64_t rounds) {                                    \
    const TileShapes shapes;                                                \
    asm volatile(                                                           \
        "ldtilecfg %3\ntilezero %%tmm0\ntilezero %%tmm1\ntilezero %%tmm2\n" \
        "tilezero %%tmm3\n" TILE_LOADS ".p2align 5\n1:\n" body              \
        "dec %0\njnz 1b\n"                                                  \
        "tilerelease\n"                                                     \
        : "+r"(rounds)                                                      \
        : "r"(tiles), "r"((int64_t)64), "m"(shapes)                         \
        : "cc", "memory");                                                  \
  }
TILE_LOOP(int8_avx512amx, PRODUCTS PRODUCTS)
TILE_LOOP(int8_tile_avx512amx, TILE_LOADS PRODUCTS TILE_LOADS PRODUCTS)

// Reads `bytes` (a multiple of 256) as four streams with prefetch: the best pattern found.
extern "C" uint64_t read_memory(const uint8_t* data, int64_t bytes) {
  const int64_t part = bytes / 4 & ~(int64_t)63;
  uint64_t sum = 0;
  for (int64_t i = 0; i < part; i += 64)
    for (int s = 0; s < 4; ++s) {
      const uint8_t* line = data + s * part + i;
      _mm_prefetch((const char*)line + 2048, _MM_HINT_T0);
      __m128i x = _mm_or_si128(_mm_load_si128((const __m128i*)line),
                               _mm_load_si128((const __m128i*)line + 1));
      x = _mm_or_si128(x, _mm_or_si128(_mm_load_si128((const __m128i*)line + 2),
                                       _mm_load_si128((const __m128i*)line + 3)));
      sum |= (uint64_t)_mm_cvtsi128_si64(x);
    }
  return sum;
}
