// SPDX-License-Identifier: Apache-2.0
// From the arguments of qk_cuda_linear to what is launched: sizes and addresses alone decide.
#pragma once

#include "activations.cuh"
#include "linear.cuh"

namespace qkern {
namespace cuda {

struct Experts {
  int64_t count;  // 0: one weight for all rows
  const int64_t* offsets;
  const float* table_scales;
};

constexpr int64_t kIntegerColumns = 65536;  // whose int32 sums cannot overflow

struct Plan {
  Layout layout;
  Schedule schedule;
  bool bytes, in_place;
  int shift;                  // integer sums come out times 2^shift
  int64_t x_group, x_groups;  // int8: columns per scale, scales per row
  int64_t x_bytes, x_scale_bytes, partial_bytes, tile_bytes;

  int64_t workspace() const { return x_bytes + x_scale_bytes + partial_bytes + tile_bytes; }
};

inline int64_t aligned(int64_t bytes) { return div_up<int64_t>(bytes, 128) * 128; }

// NULL, or why there is no plan.
inline const char* make_plan(const qk_cuda_linear_args& a, const Experts& experts, const Layout& l,
                             int sms, Plan* plan) {
  plan->layout = l;
  plan->bytes = l.bytes();
  plan->shift = l.order == Order::kByte && l.bits == 4 ? Bytes4::kShift : 0;
  plan->schedule = experts.count ? make_grouped_schedule(a.m, experts.count, l, sms)
                                 : make_schedule(a.m, l, sms);
  const bool same_columns = !l.perm && (l.groups == 1 || l.group_padded == l.group);
  plan->in_place = !plan->bytes && same_columns && a.x_col_stride == 1 && l.k % 8 == 0 &&
                   (a.m == 1 || a.x_row_stride % 8 == 0) && (uintptr_t)a.x % 16 == 0;
  plan->x_group = l.activations != QK_ACT_INT8_GROUP ? l.k
                  : l.groups > 1                     ? l.group
                                                     : min64(128, l.k);
  plan->x_groups = plan->bytes ? div_up(l.k, plan->x_group) : 0;
  plan->x_bytes = plan->in_place ? 0 : aligned(a.m * l.k_padded * (plan->bytes ? 1 : 2));
  plan->x_scale_bytes = aligned(a.m * plan->x_groups * 4);
  plan->partial_bytes = plan->schedule.split == 1
                            ? 0
                            : aligned(plan->schedule.split * a.m * l.row_tiles * kTileRows * 4);
  plan->tile_bytes =
      experts.count ? aligned(plan->schedule.token_tiles * (int64_t)sizeof(ExpertTile)) : 0;
  if (plan->bytes && l.groups > 1 && l.group > kIntegerColumns)
    return "scale groups of more than 65536 columns overflow int32 sums";
  if (plan->schedule.row_groups * plan->schedule.token_tiles >= (int64_t)1 << 31)
    return "M x N is too large for one launch";
  return nullptr;
}

inline Activations make_activations(const qk_cuda_linear_args& a, const Plan& plan) {
  return {a.x, a.x_dtype, a.m, plan.layout.k, a.x_row_stride, a.x_col_stride};
}

inline Gather make_gather(const qk_cuda_linear_args& a, const Experts& experts, const Plan& plan) {
  const uint8_t* const perm = (const uint8_t*)a.packed + plan.layout.perm_offset;
  return {true,
          plan.layout,
          plan.layout.perm ? (const int32_t*)perm : nullptr,
          experts.offsets,
          experts.count,
          plan.layout.total_bytes};
}

inline LinearParams make_params(const qk_cuda_linear_args& a, const Experts& experts,
                                const Plan& plan) {
  const Layout& l = plan.layout;
  const uint8_t* const packed = (const uint8_t*)a.packed;
  uint8_t* const workspace = (uint8_t*)a.workspace;
  LinearParams p = {};
  p.codes = packed + l.codes_offset;
  p.scales = l.factors            ? packed + l.factors_offset
             : l.scale_stored < 0 ? nullptr
                                  : packed + l.scales_offset;
  p.zeros = l.zero_stored < 0 ? nullptr : packed + l.zeros_offset;
  p.scale_dtype = l.factors ? QK_F32 : l.scale_stored;
  p.zero_dtype = l.zero_stored;
  const bool table = l.kind == QK_KIND_TABLE;
  p.table = table ? (const float*)(packed + l.table_offset) : nullptr;
  p.table_stride = l.table_per == QK_TABLE_PER_ROW ? (int64_t)1 << l.bits : 0;
  p.tables = packed + l.block_tables_offset[a.x_dtype == QK_BF16];
  p.table_bytes = (int)l.block_table_bytes;
  p.shared_tables = l.shared_tables();
  p.table_scale = table ? a.weight->table_scale : 1.f;
  p.center = table ? 0.f : (float)(1 << (l.bits - 1));
  p.x = plan.in_place ? a.x : workspace;
  // A single row has no stride of its own; rows behind it are copied with no bytes, yet aligned.
  p.x_stride = !plan.in_place ? l.k_padded : a.m == 1 ? 0 : a.x_row_stride;
  p.x_columns = plan.in_place ? l.k : l.k_padded;
  p.m = a.m;
  p.n = l.n;
  p.k_blocks = l.k_blocks;
  p.row_tiles = l.row_tiles;
  p.row_groups = plan.schedule.row_groups;
  p.token_tiles = plan.schedule.token_tiles;
  p.stages = plan.schedule.stages;
  p.groups = (int)l.groups;
  p.stage_groups = p.scales || p.zeros || p.table_bytes
                       ? stage_groups(l, shape_of(plan.schedule.shape, plan.bytes))
                       : 0;
  const int step = plan.bytes ? 32 : 16;
  p.segment_steps = l.groups > 1 || p.table_bytes                ? (int)(l.group_padded / step)
                    : plan.x_groups > 1                          ? (int)(plan.x_group / step)
                    : plan.bytes && l.k_padded > kIntegerColumns ? (int)(kIntegerColumns / step)
                                                                 : 0;
  if (p.segment_steps) {
    const Shape shape = shape_of(plan.schedule.shape, plan.bytes);
    const int steps = shape.stage_columns() / step;
    p.stage_segments = steps / p.segment_steps;
    p.stage_rest = steps % p.segment_steps;
  }
  // Tables of float8 numbers alone leave nothing to scale before the end.
  p.segment_sums = p.segment_steps && (plan.bytes || p.scales || p.zeros);
  p.segments = l.groups > 1 ? (int)l.groups : plan.x_groups > 1 ? (int)plan.x_groups : INT32_MAX;
  p.exact = plan.bytes && !p.segment_steps && !p.zeros;
  p.x_scales = plan.bytes ? (const float*)(workspace + plan.x_bytes) : nullptr;
  p.x_groups = plan.x_groups;
  p.bias = a.bias;
  p.bias_dtype = a.bias_dtype;
  p.y_dtype = a.y_dtype;
  p.y = a.y;
  p.y_stride = a.y_row_stride;
  p.partials = (uint32_t*)(workspace + plan.x_bytes + plan.x_scale_bytes);
  if (experts.count) p.tiles = (const ExpertTile*)(workspace + plan.workspace() - plan.tile_bytes);
  p.expert_bytes = l.total_bytes;
  p.table_scales = experts.table_scales;
  return p;
}

}  // namespace cuda
}  // namespace qkern
