// SPDX-License-Identifier: Apache-2.0
// 8-bit codes into tables of bytes, for the chassis of a8_avx512.h.
#pragma once

#include "a8_avx512.h"
#include "lookup8_avx512.h"

namespace qkern {
namespace {

// A table for the whole tensor, which stays in four registers.
struct WideTableCodes : IntCodes<8> {
  static constexpr int kLargest = 255;
  static constexpr bool kPlain = false;
  static constexpr bool kZeros = false;
  ByteTable256 table;

  explicit WideTableCodes(const Packed& w)
      : IntCodes<8>(w), table(static_cast<const uint8_t*>(w.table)) {}
  void load(const uint8_t* unit, int, const uint8_t*, __m512i* parts) const {
    parts[0] = table(_mm512_loadu_si512(unit));
  }
};

// A table per row or per group. Four registers are the table of one output only, so one output is
// looked up at a time, 64 columns of it, and sixteen such registers are turned to dword lanes. That
// wants a piece of columns at once: there is no way past the scratch, for one row neither.
struct WideRowTableCodes : RowTableCodes<8> {
  static constexpr bool kStreamed = false;

  explicit WideRowTableCodes(const Packed& w) : RowTableCodes<8>(w) {}

  // `length` columns of a half from `unit` on: vectors of four columns of 16 outputs, `stride`
  // bytes apart.
  void unpack(const uint8_t* unit, const uint8_t* tables, int64_t length, uint8_t* to,
              int64_t stride) const {
    for (int64_t k = 0; k < length; k += 4 * kUnit, unit += 4 * kUnitBytes) {
      const int64_t units = min64(4, (length - k) / kUnit);
#pragma GCC unroll 16
      for (int line = 0; line < 4 * kUnitBytes; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(unit + line + kStreamAhead), _MM_HINT_T0);
      alignas(64) uint8_t values[kHalf][64];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        // Unit u: outputs c, 4 + c, 8 + c, 12 + c in 16-byte lanes; then output 4l + c: the units.
        __m512i v[4];
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u)
          v[u] = u < units ? _mm512_loadu_si512(unit + u * kUnitBytes + 64 * c)
                           : _mm512_setzero_si512();
        transpose_lanes(v);
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) {
          const int r = 4 * l + c;
          _mm512_store_si512(values[r], ByteTable256(tables + 256 * r)(v[l]));
        }
      }
      // Dwords change places with outputs, as elsewhere; here the 16-byte lanes are units.
      __m512i v[kHalf];
#pragma GCC unroll 16
      for (int i = 0; i < kHalf; ++i) v[i] = _mm512_load_si512(values[i]);
      transpose_16x16(v);
#pragma GCC unroll 16
      for (int i = 0; i < kHalf; ++i)
        if (i < 4 * units) _mm512_store_si512(to + i * stride, v[i]);
      to += 16 * stride;
    }
  }
};

}  // namespace
}  // namespace qkern
