// SPDX-License-Identifier: Apache-2.0
// What the float tile multiplies: some rows of x with up to 64 outputs over some columns.
#pragma once

#include <stdint.h>

namespace qkern {

constexpr int kTileOutputs = 64;

// How weights lie, always in 64-byte vectors of 16 outputs:
enum class TileWeights {
  kValues,   // [columns][vectors][16] float32
  kEntries,  // [columns / 4][vectors][16][4] bytes, whose lowest 4 bits choose an entry of `table`
  kSigned,   // the same, bytes that are int8 values
  kUnsigned  // the same, uint8
};

struct FloatTiles {
  TileWeights kind;
  const void* weights;  // aligned to 64 bytes
  const float* table;   // [16]
  int vectors;          // 1..4
  int64_t columns;
  const float* x;
  int64_t x_stride;
  int64_t rows;
  float* sums;               // [rows][64]: partial sums of the chunk
  bool resume;               // the chain goes on from `sums`
  bool fold;                 // the finished chain is added to `sums`
  bool finish;               // the result goes through zero and scale into `acc`, else to `sums`
  float* acc;                // [rows][64]
  const float* scales;       // [64]
  const float* minus_zeros;  // [64], or NULL
  const float* x_sum;        // of row 0 and this chunk
  int64_t x_sum_stride;
};

// For each row and output: s = resume ? sums : 0; s = fma(x, value, s) over ascending columns;
// fold: s = sums + s; then sums = s, or acc = fma(fma(-zero, x_sum, s), scale, acc).
void a32_tiles_avx512(const FloatTiles& t);

}  // namespace qkern
