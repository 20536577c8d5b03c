// SPDX-License-Identifier: Apache-2.0
// Dense bit streams: code k of a row is bits k*b .. k*b+b-1, low bits first (little-endian).
//
// Eight codes are always a whole number of bytes (b of them), so a stream is worked on in words of
// eight codes held one per byte. Squeezing such a word takes three steps, each of which joins
// neighbouring lanes (bytes, pairs, quads); spreading undoes them. Bits after the last code of a
// row are written as 0 and ignored on reading. No byte outside ceil(k*b/8) is touched.
#pragma once

#include <stdint.h>
#include <string.h>

#include "numeric.h"

namespace qkern {

static inline int64_t stream_bytes(int64_t k, int bits) {
  return k / 8 * bits + (k % 8 * bits + 7) / 8;  // no product that could overflow
}

// Every byte of `codes` must be below 2^bits.
template <int bits>
static inline uint64_t squeeze_codes(uint64_t codes) {
  codes = (codes & 0x00ff00ff00ff00ffu) | ((codes & 0xff00ff00ff00ff00u) >> (8 - bits));
  codes = (codes & 0x0000ffff0000ffffu) | ((codes & 0xffff0000ffff0000u) >> (16 - 2 * bits));
  return (codes & 0x00000000ffffffffu) | ((codes & 0xffffffff00000000u) >> (32 - 4 * bits));
}

template <int bits>
static inline uint64_t spread_codes(uint64_t dense) {
  constexpr uint64_t quad = (UINT64_C(1) << 4 * bits) - 1;
  constexpr uint64_t pair = ((UINT64_C(1) << 2 * bits) - 1) * 0x0000000100000001u;
  constexpr uint64_t one = ((UINT64_C(1) << bits) - 1) * 0x0001000100010001u;
  dense = (dense & quad) | ((dense & quad << 4 * bits) << (32 - 4 * bits));
  dense = (dense & pair) | ((dense & pair << 2 * bits) << (16 - 2 * bits));
  return (dense & one) | ((dense & one << bits) << (8 - bits));
}

template <int bits>
static inline void pack_codes(const uint8_t* codes, int64_t count, uint8_t* stream) {
  uint64_t word;
  for (; count >= 8; count -= 8, codes += 8, stream += bits) {
    memcpy(&word, codes, 8);
    word = squeeze_codes<bits>(word);
    memcpy(stream, &word, bits);
  }
  if (count == 0) return;
  word = 0;
  memcpy(&word, codes, (size_t)count);
  word = squeeze_codes<bits>(word);
  memcpy(stream, &word, (size_t)stream_bytes(count, bits));
}

template <int bits>
static inline void unpack_codes(const uint8_t* stream, int64_t count, uint8_t* codes) {
  uint64_t word = 0;
  for (; count >= 8; count -= 8, codes += 8, stream += bits) {
    memcpy(&word, stream, bits);
    const uint64_t spread = spread_codes<bits>(word);
    memcpy(codes, &spread, 8);
  }
  if (count == 0) return;
  word = 0;
  memcpy(&word, stream, (size_t)stream_bytes(count, bits));
  word = spread_codes<bits>(word);
  memcpy(codes, &word, (size_t)count);
}

using PackCodes = void (*)(const uint8_t* codes, int64_t count, uint8_t* stream);
using UnpackCodes = void (*)(const uint8_t* stream, int64_t count, uint8_t* codes);

// The routine for 1..8 bits.
static inline PackCodes pack_codes_for(int bits) {
  static const PackCodes table[8] = {pack_codes<1>, pack_codes<2>, pack_codes<3>, pack_codes<4>,
                                     pack_codes<5>, pack_codes<6>, pack_codes<7>, pack_codes<8>};
  return table[bits - 1];
}

static inline UnpackCodes unpack_codes_for(int bits) {
  static const UnpackCodes table[8] = {unpack_codes<1>, unpack_codes<2>, unpack_codes<3>,
                                       unpack_codes<4>, unpack_codes<5>, unpack_codes<6>,
                                       unpack_codes<7>, unpack_codes<8>};
  return table[bits - 1];
}

// Codes of one row made piece by piece: make(begin, end, codes) writes the codes of columns
// [begin, end), one per byte. Pieces begin at multiples of eight codes, that is, on whole bytes.
template <class Make>
static inline void write_codes(int64_t k, int bits, uint8_t* stream, const Make& make) {
  constexpr int64_t kPiece = 2048;
  uint8_t codes[kPiece];
  const PackCodes pack = pack_codes_for(bits);
  for (int64_t begin = 0; begin < k; begin += kPiece) {
    const int64_t end = min64(k, begin + kPiece);
    make(begin, end, codes);
    pack(codes, end - begin, stream + begin / 8 * bits);
  }
}

}  // namespace qkern
