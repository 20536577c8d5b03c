// SPDX-License-Identifier: Apache-2.0
// Schedules: every (tile, column) is computed exactly once, splits do not depend on M inside a
// family, and everything fits in shared memory.
#include "../schedule.h"

#include <vector>

#include "check.h"

using namespace qkern::cuda;

namespace {

Layout layout_of(int64_t n, int64_t k, int bits, int64_t group, bool bytes) {
  qk_weight w = {};
  w.struct_size = sizeof w;
  w.kind = QK_KIND_INT;
  w.bits = bits;
  w.activations = bytes ? QK_ACT_INT8 : QK_ACT_FLOAT;
  w.n = n;
  w.k = k;
  w.group = group;
  const float one = 1;
  w.scales = &one;
  Layout l;
  const char* reason = make_layout(w, &l);
  CHECK(!reason, "%s", reason);
  return l;
}

void check_cover(int64_t m, const Layout& l, int sms) {
  const Schedule s = make_schedule(m, l, sms);
  const Shape shape = shape_of(s.shape, l.bytes());
  CHECK(s.row_groups * shape.warps_rows >= l.row_tiles &&
            (s.row_groups - 1) * shape.warps_rows < l.row_tiles,
        "row groups cover the rows");
  CHECK(s.token_tiles * shape.tokens() >= m && (s.token_tiles - 1) * shape.tokens() < m,
        "token tiles cover m = %lld", (long long)m);
  std::vector<char> seen((size_t)(s.row_groups * s.token_tiles));
  for (int64_t i = 0; i < s.row_groups * s.token_tiles; ++i) {
    const TileIndex t = tile_of(i, s.row_groups, s.token_tiles);
    CHECK(t.row_group >= 0 && t.row_group < s.row_groups && t.token_tile >= 0 &&
              t.token_tile < s.token_tiles,
          "tile %lld", (long long)i);
    char& cell = seen[(size_t)(t.row_group * s.token_tiles + t.token_tile)];
    CHECK(!cell, "tile %lld twice", (long long)i);
    cell = 1;
  }
  CHECK(
      split_begin(s.stages, s.split, 0) == 0 && split_begin(s.stages, s.split, s.split) == s.stages,
      "splits cover K");
  for (int z = 0; z < s.split; ++z)
    CHECK(split_begin(s.stages, s.split, z) < split_begin(s.stages, s.split, z + 1),
          "split %d of %d is empty", z, s.split);
  CHECK(s.stages * shape.stage_blocks() >= l.k_blocks, "stages cover the blocks");
}

void check_families(const Layout& l, int sms) {
  int split[3] = {0, 0, 0};
  for (int64_t m = 1; m <= 1100; m += m < 300 ? 1 : 97) {
    const Schedule s = make_schedule(m, l, sms);
    const int family = m <= kDecodeTokens ? 0 : m <= kMiddleTokens ? 1 : 2;
    if (split[family] == 0) split[family] = s.split;
    CHECK(s.split == split[family], "m %lld: split %d, not %d", (long long)m, s.split,
          split[family]);
    // Inside a family, warps along K and blocks per stage fix the order of sums.
    const Shape shape = shape_of(s.shape, l.bytes());
    CHECK(shape.warps_k == (family == 0 ? 4 : 1), "m %lld", (long long)m);
    CHECK(family != 0 || shape.warp_blocks == 1, "m %lld", (long long)m);
  }
  CHECK(split[2] == 1, "wide batches are not split");
}

// The groups that a stage touches, counted one column at a time.
void check_stage_groups(const Layout& l, Shape shape) {
  if (l.groups == 1) return;
  int64_t most = 0;
  for (int64_t c = 0; c < l.k_padded; c += shape.stage_columns()) {
    const int64_t last =
        (c + shape.stage_columns() < l.k_padded ? c + shape.stage_columns() : l.k_padded) - 1;
    const int64_t first_group = c / l.group_padded;
    const int64_t last_group =
        last / l.group_padded < l.groups - 1 ? last / l.group_padded : l.groups - 1;
    if (last_group - first_group + 1 > most) most = last_group - first_group + 1;
  }
  CHECK(stage_groups(l, shape) >= most && stage_groups(l, shape) <= most + 1,
        "group %lld: %d staged, %lld touched", (long long)l.group, stage_groups(l, shape),
        (long long)most);
  CHECK(stage_groups(l, shape) <= shape.stage_blocks() * groups_per_block(l.bytes(), false),
        "group %lld", (long long)l.group);
}

// Schedules of a mixture of experts: few rows are split alike, however many there are.
void check_grouped(const Layout& l, int64_t experts) {
  const int few = make_grouped_schedule(1, experts, l, 132).split;
  CHECK(few >= 1 && few <= 16 && few <= make_schedule(1, l, 132).split, "%d splits", few);
  CHECK(l.n > 512 || l.k < 4096 || few > 1, "%d splits leave the device idle", few);
  for (const int64_t m : {1, 8, 9, 63, 64, 65, 100, 1000, 100000}) {
    const Schedule s = make_grouped_schedule(m, experts, l, 132);
    const int64_t average = div_up(m, m < experts ? m : experts);
    const Shape shape = shape_of(s.shape, false);
    CHECK(s.split == (m <= kFewRows ? few : 1), "m %lld: %d splits", (long long)m, s.split);
    CHECK(s.shape == make_schedule(average, l, 132).shape, "m %lld", (long long)m);
    CHECK(s.token_tiles == most_tiles(m, experts, shape.tokens()), "m %lld", (long long)m);
    for (int z = 0; z < s.split; ++z)
      CHECK(split_begin(s.stages, s.split, z) < split_begin(s.stages, s.split, z + 1),
            "split %d of %d is empty", z, s.split);
  }
}

// The bound on tiles, and the expert of every row, for offsets with and without empty experts.
void check_experts() {
  Random random(3);
  for (int round = 0; round < 3000; ++round) {
    const int64_t experts = 1 + random.below(round % 10 ? 9 : 400);
    std::vector<int64_t> offsets = {0};
    for (int64_t e = 0; e < experts; ++e)
      offsets.push_back(offsets.back() + (random.below(3) ? random.below(40) : 0));
    const int64_t m = offsets.back();
    for (const int tokens : {8, 16, 32, 64}) {
      int64_t tiles = 0;
      for (int64_t e = 0; e < experts; ++e)
        tiles += div_up<int64_t>(offsets[(size_t)e + 1] - offsets[(size_t)e], tokens);
      CHECK(tiles <= most_tiles(m, experts, tokens), "%lld tiles", (long long)tiles);
    }
    for (int64_t e = 0; e < experts; ++e)
      for (int64_t row = offsets[(size_t)e]; row < offsets[(size_t)e + 1]; ++row)
        CHECK(expert_of(offsets.data(), experts, row) == e, "row %lld", (long long)row);
  }
  for (const int64_t n : {512, 4096, 28672})
    for (const int64_t k : {64, 4096, 14336})
      for (const int64_t experts : {1, 2, 8, 256})
        check_grouped(layout_of(n, k, 4, 0, false), experts);
}

}  // namespace

void check_schedules() {
  const int64_t ns[] = {1, 63, 64, 65, 1000, 4096, 6144, 28672};
  const int64_t ks[] = {1, 64, 100, 1024, 4096, 14336};
  for (const bool bytes : {false, true})
    for (const int64_t n : ns)
      for (const int64_t k : ks)
        for (const int sms : {20, 46, 84, 108, 132, 148}) {
          const Layout l = layout_of(n, k, 4, 0, bytes);
          check_families(l, sms);
          for (const int64_t m : {1, 8, 9, 16, 17, 32, 33, 64, 65, 200, 256, 257, 1000, 4096})
            check_cover(m, l, sms);
        }
  check_experts();
  for (const bool bytes : {false, true})
    for (int64_t group = 8; group <= 400; group += 8)
      for (const int64_t k : {64, 401, 1024, 4096})
        for (int s = 0; s < kShapes; ++s)
          check_stage_groups(layout_of(64, k, 4, group, bytes), shape_of(s, bytes));
  // Worst case of every kernel within the smallest limit of the devices since 8.0.
  for (const bool bytes : {false, true})
    for (const int bits : {2, 3, 4, 8})
      for (const bool zeros : {false, true})
        for (const bool block_tables : {false, true})
          for (int s = 0; s < kShapes; ++s) {
            if (block_tables && bits == 8) continue;
            const Shape shape = shape_of(s, bytes);
            const int one = stage_bytes(shape, bits, bytes) +
                            worst_group_bytes(shape, groups_per_block(bytes, block_tables), zeros,
                                              block_tables ? kTileRows << bits << !bytes : 0);
            const int bytes_used = stage_count(one, 0) * one;
            CHECK(bytes_used <= kSharedLimit && sums_bytes(shape) <= kSharedLimit,
                  "shape %d bits %d: %d bytes", s, bits, bytes_used);
          }
}
