// SPDX-License-Identifier: Apache-2.0
// Who computes what: pure functions of (M, N, K, number of multiprocessors, format). Nothing here
// asks a device or measures anything; tests/test_cuda_host.py sweeps all of it.
//
// A block of threads owns `row_tiles` tiles of 64 outputs, `tokens()` rows of activations and a
// range of stages (runs of 64-column blocks). Three families by M:
//
//   decode  M <= 64        1 row tile,  8 / 16 / 32 tokens, four warps along K
//   middle  65 <= M <= 256 4 row tiles, 64 tokens
//   wide    above          the same, never split
//
// The number of splits of K depends on (N, K, multiprocessors) and the family, never on M; each
// split's stages and each warp's blocks ascend and partial sums are added in ascending order, so a
// row of the output has the same bits in every batch of its family. A mixture of experts has three
// families too: at most 64 rows in all, at most 64 per expert on average, above.
#pragma once

#include "experts.cuh"

namespace qkern {
namespace cuda {

struct Shape {
  int fragments;   // of 8 tokens, per warp
  int warps_rows;  // x 64 outputs
  int warps_tokens;
  int warps_k;      // each takes its own blocks of a stage
  int warp_blocks;  // consecutive blocks of a stage that a warp takes

  QK_HD constexpr int warps() const { return warps_rows * warps_tokens * warps_k; }
  QK_HD constexpr int threads() const { return warps() * 32; }
  QK_HD constexpr int tokens() const { return 8 * fragments * warps_tokens; }
  QK_HD constexpr int stage_blocks() const { return warps_k * warp_blocks; }
  QK_HD constexpr int stage_columns() const { return stage_blocks() * kBlockColumns; }
};

// int8 activations need 128 columns for a row of 128 bytes in shared memory.
QK_HD constexpr Shape shape_of(int index, bool bytes) {
  return index == 0   ? Shape{1, 1, 1, 4, 1}
         : index == 1 ? Shape{2, 1, 1, 4, 1}
         : index == 2 ? Shape{4, 1, 1, 4, 1}
                      : Shape{4, 4, 2, 1, bytes ? 2 : 1};
}
constexpr int kShapes = 4;
constexpr int kDecodeTokens = 64, kMiddleTokens = 256;

// Shared memory: as many stages as fit in what every device since 8.0 gives a block (99 KB), with
// the worst case of scales, zeros and block tables, at least two, at most six.
constexpr int kSharedLimit = 99 * 1024;
QK_HD constexpr int groups_per_block(bool bytes, bool block_tables) {  // at most
  return block_tables ? 1 : bytes ? 2 : 4;
}
QK_HD constexpr int worst_group_bytes(Shape s, int groups, bool zeros, int block_table_bytes) {
  return s.warps_rows * s.stage_blocks() * groups *
         (kTileRows * 4 * (zeros ? 2 : 1) + block_table_bytes);
}
QK_HD constexpr int stage_bytes(Shape s, int bits, bool bytes) {
  return s.warps_rows * s.stage_blocks() * bits * kVectorBytes +
         s.tokens() * s.stage_columns() * (bytes ? 1 : 2);
}
QK_HD constexpr int stage_count(int stage_and_group_bytes, int fixed_bytes) {
  const int fit = (kSharedLimit - fixed_bytes) / stage_and_group_bytes;
  return fit > 6 ? 6 : fit < 2 ? 2 : fit;
}
// Partial sums of a block of threads, before they are added up: [warps_k][tokens][outputs + 4].
QK_HD constexpr int sums_bytes(Shape s) {
  return s.warps_k * s.tokens() * (s.warps_rows * kTileRows + 4) * 4;
}

// Most scale groups that the columns of one stage touch; 0: nothing differs between groups.
inline int stage_groups(const Layout& l, Shape s) {
  if (l.groups == 1 && l.block_table_bytes == 0) return 0;
  const int64_t columns = s.stage_columns(), g = l.group_padded;
  const int64_t touched = g % columns == 0   ? 1
                          : columns % g == 0 ? columns / g
                                             : (columns + g - l.unit - 1) / g + 1;
  return (int)min64(touched, l.groups);
}

struct Schedule {
  int shape;
  int64_t row_groups, token_tiles;  // grid.x is their product
  int64_t stages;                   // along K, all splits together
  int split;                        // grid.y
};

inline int decode_split(int64_t row_groups, int64_t stages, int sms) {
  // Two blocks of threads per multiprocessor hide each other's waiting; four stages pay for one
  // more partial sum.
  int64_t split = 2 * (int64_t)sms / row_groups;
  split = min64(split, stages / 4);
  return (int)max64(1, min64(split, 16));
}
inline int middle_split(int64_t row_groups, int64_t stages, int sms) {
  int64_t split = (int64_t)sms / (2 * row_groups);  // as if M were 128: two token tiles
  split = min64(split, stages / 8);
  return (int)max64(1, min64(split, 8));
}

inline Schedule make_schedule(int64_t m, const Layout& l, int sms) {
  const bool bytes = l.bytes();
  Schedule s = {};
  s.shape = m <= 8 ? 0 : m <= 16 ? 1 : m <= kDecodeTokens ? 2 : 3;
  const Shape shape = shape_of(s.shape, bytes);
  s.row_groups = div_up<int64_t>(l.row_tiles, shape.warps_rows);
  s.token_tiles = div_up<int64_t>(m, shape.tokens());
  s.stages = div_up<int64_t>(l.k_blocks, shape.stage_blocks());
  s.split = s.shape < 3          ? decode_split(s.row_groups, s.stages, sms)
            : m <= kMiddleTokens ? middle_split(s.row_groups, s.stages, sms)
                                 : 1;
  return s;
}

// Mixture of experts: m rows of all of them. The shape follows from how many an expert has on
// average. How many experts have rows is known on the device alone; few rows are split as if four
// had some (a row goes to 2 to 8 of them as a rule, so that with one row all are at work and with
// many there are blocks enough). Above, experts fill the device, and partial sums would be more
// bytes than weights.
constexpr int kFewRows = 64, kBusyExperts = 4;
inline Schedule make_grouped_schedule(int64_t m, int64_t experts, const Layout& l, int sms) {
  Schedule s = make_schedule(div_up<int64_t>(m, min64(experts, m)), l, sms);
  s.token_tiles = most_tiles(m, experts, shape_of(s.shape, l.bytes()).tokens());
  s.split =
      m <= kFewRows ? decode_split(min64(experts, kBusyExperts) * s.row_groups, s.stages, sms) : 1;
  return s;
}

// First stage of split z; split `split` starts where the stages end.
QK_HD int64_t split_begin(int64_t stages, int split, int z) { return stages * z / split; }

// Which tile block `index` of grid.x computes. Eight token tiles go together before the next rows,
// so that what runs at the same time shares weights and a bounded set of activations.
struct TileIndex {
  int64_t row_group, token_tile;
};
QK_HD TileIndex tile_of(int64_t index, int64_t row_groups, int64_t token_tiles) {
  constexpr int64_t kRaster = 8;
  const int64_t raster = index / (kRaster * row_groups);
  const int64_t rest = index - raster * kRaster * row_groups;
  const int64_t left = token_tiles - raster * kRaster;
  const int64_t width = left < kRaster ? left : kRaster;
  return {rest / width, raster * kRaster + rest % width};
}

}  // namespace cuda
}  // namespace qkern
