// SPDX-License-Identifier: Apache-2.0
// What the float tile multiplies: some rows of x with up to 64 outputs over some columns.
#pragma once

#include <stdint.h>

namespace qkern {

constexpr int kTileOutputs = 64;

// What the bytes of weights are.
enum class TileWeights {
  kEntries,     // their lowest 4 bits choose an entry of `table`
  kOwnEntries,  // the same, with a table for each vector
  kSigned,      // int8 values
  kUnsigned,    // uint8 values
  kFloats       // not bytes but float32 values, [columns][vectors][16]
};

struct FloatTiles {
  TileWeights kind;
  const uint8_t* weights;  // [columns / 4][vectors][16 outputs][4 columns], aligned to 64 bytes
  const float* table;      // [16], or [vectors][16]
  int vectors;             // 1..4
  int64_t columns;         // a multiple of 4
  const float* x;
  int64_t x_stride;
  int64_t rows;
  float* sums;               // [rows][64]: partial sums of the chunk
  bool resume;               // the chain goes on from `sums`
  bool finish;               // the result goes through zero and scale into `acc`, else to `sums`
  float* acc;                // [rows][64]
  const float* scales;       // [64]
  const float* minus_zeros;  // [64], or NULL
  const float* x_sum;        // of row 0 and this chunk
  int64_t x_sum_stride;
};

// For each row and output: s = resume ? sums : 0; s = fma(x, value, s) over ascending columns; then
// sums = s, or acc = fma(fma(-zero, x_sum, s), scale, acc).
void a32_tiles_avx512(const FloatTiles& t);

}  // namespace qkern
