// SPDX-License-Identifier: Apache-2.0
// Tile registers (AMX) by number, so that templates can use them, and without compiler flags. A
// tile is up to 16 rows of up to 64 bytes.
#pragma once

#include <stdint.h>

namespace qkern {
namespace {

// What LDTILECFG reads.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t tile_rows, int64_t bytes) {
    rows[tile] = (uint8_t)tile_rows;
    row_bytes[tile] = (uint16_t)bytes;
  }
};

// Tile registers are in use from here to tiles_release(), which leaves nothing to save when threads
// switch. (No guard object: what may unwind leaves a weak symbol in the object file.)
inline void tiles_configure(const TileShapes& shapes) {
  __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
}

inline void tiles_release() { __asm__ volatile("tilerelease"); }

template <int kTile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
inline void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
}

template <int kTile>
inline void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
}

// sums += activations (signed) . weights (unsigned; a row is four columns of 16 outputs)
template <int kSums, int kActivations, int kWeights>
inline void tile_dot() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kActivations),
                   "i"(kWeights));
}

// The same with signed weights.
template <int kSums, int kActivations, int kWeights>
inline void tile_dot_signed() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kActivations),
                   "i"(kWeights));
}

}  // namespace
}  // namespace qkern
