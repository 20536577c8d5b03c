// SPDX-License-Identifier: Apache-2.0
// The order in which a rectangle of panels and rows is walked, for every kernel of aarch64: panel
// after panel, in each of them blocks of rows, so that a panel is read from memory once.
#pragma once

#include "codes_neon.h"

namespace qkern {
namespace {

struct Block {
  const LinearJob& job;
  int64_t m;  // first row
  int rows;
  int64_t panel;

  int halves() const { return job.w->halves_of(panel); }
  // Group g of the panel.
  const uint8_t* group(int64_t g) const {
    return job.w->group_block(job.w->panel(panel), g, halves());
  }
};

// Columns of a group in a panel.
struct Piece {
  const uint8_t* codes;   // its first unit
  const uint8_t* tables;  // the tables it uses, as stored; unused for Int
  int halves;
  int64_t columns;
};

inline Piece piece_at(const Block& b, int64_t g, int64_t k0, int64_t columns) {
  const Packed& w = *b.job.w;
  Piece p;
  p.halves = b.halves();
  p.codes = w.codes_of(b.group(g)) + k0 * p.halves * (kHalf * w.h.bits) / 8;
  p.tables = w.table               ? static_cast<const uint8_t*>(w.table)
             : w.group_table_bytes ? b.group(g)
                                   : w.panel(b.panel);
  p.columns = columns;
  return p;
}

inline GroupScales scales_at(const Block& b, int64_t g, int half) {
  return load_scales(*b.job.w, b.group(g), g, b.halves(), half);
}

// Adds the float sums of a chunk, [half][row][16], to the accumulators.
inline void end_float_chunk(const Block& b, int64_t g, int64_t chunk, const float* sums,
                            float* acc) {
  const LinearJob& job = b.job;
  for (int half = 0; half < b.halves(); ++half) {
    const GroupScales scales = scales_at(b, g, half);
    for (int i = 0; i < b.rows; ++i, sums += kHalf, acc += kHalf) {
      const Half sum = {
          {vld1q_f32(sums), vld1q_f32(sums + 4), vld1q_f32(sums + 8), vld1q_f32(sums + 12)}};
      add_chunk(scales, sum, scales.asymmetric ? job.x_sum[(b.m + i) * job.chunks + chunk] : 0.f,
                job.w->h.table_scale, acc);
    }
  }
}

// Rounds and stores all outputs of a block; acc is [half][row][16].
inline void finish_block(const Block& b, const float* acc) {
  for (int half = 0; half < b.halves(); ++half)
    for (int i = 0; i < b.rows; ++i, acc += kHalf)
      finish_half(b.job, acc, b.m + i, (b.panel * b.job.w->panel_halves + half) * kHalf);
}

// Calls compute(block) for blocks that cover the rectangle; `row_block` rows at most.
template <class Compute>
inline void walk(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1,
                 int64_t row_block, const Compute& compute) {
  for (int64_t p = p0; p < p1; ++p)
    for (int64_t m = m0; m < m1; m += row_block)
      compute(Block{job, m, (int)min64(row_block, m1 - m), p});
}

}  // namespace
}  // namespace qkern
