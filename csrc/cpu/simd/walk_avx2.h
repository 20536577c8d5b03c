// SPDX-License-Identifier: Apache-2.0
// The order in which a rectangle of panels and rows is walked, for every kernel of the level.
//
// A block is some rows times up to four panels that lie far apart: the thread's range of panels is
// cut in contiguous parts and one panel of each part is in flight, because several streams of
// addresses read memory faster than one. Only few rows take several panels; with many rows the
// weights come from the cache anyway and the accumulators want the room.
#pragma once

#include "codes_avx2.h"

namespace qkern {
namespace {

constexpr int kStreams = 4;
constexpr int64_t kStreamRows = 4;  // up to that many rows, panels are streamed
constexpr int64_t kRowBlock = 64;   // rows whose sums and accumulators stay in the first cache

struct Block {
  const LinearJob& job;
  int64_t m;  // first row
  int rows;
  int streams;
  int64_t panels[kStreams];

  // Halves of all streams, numbered through; only the last panel of a weight may have one.
  int halves(int s) const { return job.w->halves_of(panels[s]); }
  int half_count() const { return (streams - 1) * (int)job.w->panel_halves + halves(streams - 1); }
};

// Where column k0 of group g of stream s begins.
inline Piece piece_at(const Block& b, int s, int64_t g, int64_t k0, int64_t columns) {
  const Packed& w = *b.job.w;
  const uint8_t* panel = w.panel(b.panels[s]);
  const int halves = b.halves(s);
  const uint8_t* block = w.group_block(panel, g, halves);
  Piece p;
  p.codes = w.codes_of(block) + k0 * halves * (kHalf * w.h.bits) / 8;
  p.tables = w.half_tables(panel, g, halves, 0);
  p.halves = halves;
  p.columns = columns;
  return p;
}

inline GroupScales scales_at(const Block& b, int s, int64_t g, int half) {
  const Packed& w = *b.job.w;
  const int halves = b.halves(s);
  return load_scales(w, w.group_block(w.panel(b.panels[s]), g, halves), g, halves, half);
}

// Adds the float sums of a chunk, [half][row][16], to the accumulators.
inline void end_float_chunk(const Block& b, int64_t g, int64_t chunk, const float* sums,
                            float* acc) {
  const LinearJob& job = b.job;
  for (int s = 0; s < b.streams; ++s)
    for (int half = 0; half < b.halves(s); ++half) {
      const GroupScales scales = scales_at(b, s, g, half);
      for (int i = 0; i < b.rows; ++i, sums += kHalf, acc += kHalf)
        add_chunk(scales, {{_mm256_loadu_ps(sums), _mm256_loadu_ps(sums + 8)}},
                  scales.asymmetric ? job.x_sum[(b.m + i) * job.chunks + chunk] : 0.f,
                  job.w->h.table_scale, acc);
    }
}

// Rounds and stores all outputs of a block; acc is [half][row][16].
inline void finish_block(const Block& b, const float* acc) {
  for (int s = 0; s < b.streams; ++s)
    for (int half = 0; half < b.halves(s); ++half)
      for (int i = 0; i < b.rows; ++i) {
        const int64_t at = (s * b.job.w->panel_halves + half) * b.rows + i;
        finish_half(b.job, acc + at * kHalf, b.m + i,
                    (b.panels[s] * b.job.w->panel_halves + half) * kHalf);
      }
}

// Calls compute(block) for blocks that cover the rectangle; `row_block` rows at most.
template <class Compute>
inline void walk(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1,
                 int64_t row_block, const Compute& compute) {
  const int parts = m1 - m0 <= kStreamRows ? kStreams : 1;
  const int64_t part = ceil_div(p1 - p0, parts);
  for (int64_t i = 0; i < part; ++i) {
    Block b = {job, 0, 0, 0, {}};
    for (int64_t p = p0 + i; p < p1; p += part) b.panels[b.streams++] = p;
    for (b.m = m0; b.m < m1; b.m += b.rows) {
      b.rows = (int)min64(row_block, m1 - b.m);
      compute(b);
    }
  }
}

}  // namespace
}  // namespace qkern
