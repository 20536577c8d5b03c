// SPDX-License-Identifier: Apache-2.0
// Convolution as a matrix product that is never written down: blocks of patches are gathered into
// scratch as ready rows of activations, and the kernels of `linear` run on them.
//
// A tile is a block of output positions of one group times a range of panels; each is gathered,
// multiplied and stored by one thread, so that threads never wait for each other. Where there are
// fewer blocks than threads several gather the same patches for panels of their own.

#include <cstring>

#include "activations.h"
#include "error.h"
#include "parallel.h"
#include "structs.h"

namespace qkern {
namespace {

constexpr int64_t kBlockBytes = 1 << 18;  // of ready rows, so that they stay in the second cache
constexpr int64_t kFewestRows = 16, kMostRows = 128;  // of a block
constexpr int64_t kTilePanels = 4;                    // whose results wait in scratch
constexpr int64_t kSerialWork = 1 << 16;              // multiply-adds that need one thread only

struct Plan {
  Packed w;
  const KernelRow* kernel;
  RowLayout rows;
  int64_t taps, group_channels, group_outputs;
  int64_t image, positions, blocks;  // output positions of an image, of all; blocks of them
  int64_t panel_outputs, most_panels;
  int64_t splits, tasks;
  bool direct;  // kernels write y itself
  // Offsets into a task's scratch, which the ready rows begin, and their sum.
  int64_t patch_at, ordered_at, taps_at, places_at, tile_at, task_bytes;
  int64_t bias_at, bytes;  // after the scratch of all tasks
};

qk_status check_sizes(const qk_conv_args& a) {
  const int64_t at_least_0[] = {a.batch,      a.channels,  a.height,  a.width,
                                a.out_height, a.out_width, a.pad_top, a.pad_left};
  const int64_t at_least_1[] = {a.kernel_height, a.kernel_width,    a.stride_height,
                                a.stride_width,  a.dilation_height, a.dilation_width,
                                a.groups};
  for (const int64_t size : at_least_0)
    if (size < 0 || size > INT32_MAX)
      return fail(QK_INVALID_ARGUMENT, "qk_conv: sizes and padding are 0 to 2^31 - 1, got %lld",
                  (long long)size);
  for (const int64_t size : at_least_1)
    if (size < 1 || size > INT32_MAX)
      return fail(QK_INVALID_ARGUMENT,
                  "qk_conv: kernel, stride, dilation and groups are 1 to 2^31 - 1, got %lld",
                  (long long)size);
  const double patches =
      (double)a.batch * (double)a.out_height * (double)a.out_width * (double)a.groups;
  if (patches > 9e15)
    return fail(QK_INVALID_ARGUMENT, "qk_conv: %.0f patches are too many", patches);
  return QK_OK;
}

// The caller's arguments in `a`, checked.
qk_status read_args(const qk_conv_args* args, qk_conv_args* a) {
  if (qk_status s = read_struct("qk_conv_args", args, a)) return s;
  if (qk_status s = check_parallel(a->parallel)) return s;
  if (!is_float(a->x_dtype) || !is_float(a->y_dtype) || (a->bias && !is_float(a->bias_dtype)))
    return fail(QK_INVALID_ARGUMENT, "qk_conv: x, bias and y must be float32, float16 or bfloat16");
  if (qk_status s = check_sizes(*a)) return s;
  const bool empty_x = a->batch * a->channels == 0 || a->height == 0 || a->width == 0;
  const bool empty_y = a->batch == 0 || a->out_height == 0 || a->out_width == 0;
  if ((!a->x && !empty_x) || (!a->y && !empty_y))
    return fail(QK_INVALID_ARGUMENT, "qk_conv: x and y must not be NULL");
  return QK_OK;
}

// Whether the weight belongs to this input.
qk_status check_weight(const qk_conv_args& a, const Packed& w) {
  const int64_t taps = a.kernel_height * a.kernel_width;  // below 2^62
  if (a.channels % a.groups || w.h.n % a.groups)
    return fail(QK_INVALID_ARGUMENT,
                "qk_conv: %lld channels and %lld outputs cannot be divided into %lld groups",
                (long long)a.channels, (long long)w.h.n, (long long)a.groups);
  const int64_t channels = a.channels / a.groups;
  if (channels == 0 || w.h.k % channels || w.h.k / channels != taps)
    return fail(QK_INVALID_ARGUMENT,
                "qk_conv: the weight has %lld columns, but %lld channels per group times a kernel "
                "of %lld x %lld came",
                (long long)w.h.k, (long long)channels, (long long)a.kernel_height,
                (long long)a.kernel_width);
  return QK_OK;
}

// The stride at which the output positions follow each other, or 0 where there is none or where
// channels are not dense: then kernels cannot write y themselves.
int64_t position_stride(const qk_conv_args& a) {
  const int64_t* s = a.y_stride;
  const int64_t stride = a.out_width > 1 ? s[3] : a.out_height > 1 ? s[2] : s[0];
  const bool even = (a.out_height == 1 || s[2] == stride * a.out_width) &&
                    (a.batch == 1 || s[0] == stride * a.out_width * a.out_height);
  return s[1] == 1 && even ? stride : 0;
}

qk_status make_plan(const qk_conv_args& a, Plan* plan) {
  Plan& p = *plan;
  if (qk_status s = packed_open(a.packed, a.packed_bytes, &p.w)) return s;
  if (qk_status s = check_weight(a, p.w)) return s;
  qk_status status = QK_OK;
  p.kernel = select_linear(p.w, a.kernel, &status);
  if (!p.kernel) return status;
  const PackedHeader& h = p.w.h;
  p.taps = a.kernel_height * a.kernel_width;
  p.group_channels = a.channels / a.groups;
  p.group_outputs = h.n / a.groups;
  p.image = a.out_height * a.out_width;
  p.positions = a.batch * p.image;
  p.panel_outputs = p.w.panel_halves * kHalf;
  // A group's outputs begin and end anywhere in a panel.
  p.most_panels = min64(p.w.panel_count, (p.group_outputs - 1) / p.panel_outputs + 2);
  p.direct = position_stride(a) >= h.n && (a.groups == 1 || p.group_outputs % p.panel_outputs == 0);

  const int64_t row_bytes = row_layout(p.w, 1, true).bytes;
  const int64_t rows = min64(max64(kBlockBytes / row_bytes, kFewestRows), kMostRows);
  p.rows = row_layout(p.w, min64(rows, p.positions), true);
  p.blocks = p.positions ? ceil_div(p.positions, p.rows.rows) : 0;
  const int64_t units = p.blocks * a.groups;
  const double work = (double)p.positions * (double)h.n * (double)h.k;
  const int threads = work < kSerialWork ? 1 : parallel_threads(a.parallel);
  p.splits = units && units < threads ? min64(threads / units, p.most_panels) : 1;
  p.tasks = min64(units * p.splits, threads);

  const int size = dtype_size(a.x_dtype);
  p.task_bytes = p.rows.bytes;
  auto take = [&](int64_t bytes) {
    const int64_t begin = p.task_bytes;
    p.task_bytes = round_up(begin + bytes, 64);
    return begin;
  };
  p.patch_at = take(h.k * size);
  p.ordered_at = take(p.w.perm ? h.k * size : 0);
  p.taps_at = take(p.taps * 8);
  p.places_at = take(p.direct ? 0 : p.rows.rows * 8);
  const int64_t tile_outputs = min64(p.most_panels, kTilePanels) * p.panel_outputs;
  p.tile_at = take(p.direct ? 0 : p.rows.rows * tile_outputs * dtype_size(a.y_dtype));
  p.bias_at = p.tasks * p.task_bytes;
  p.bytes = p.bias_at + (copies_bias(a.bias, a.bias_dtype) ? round_up(h.n * 4, 64) : 0);
  return QK_OK;
}

// An output position, and the one behind it: a division per patch would cost as much as a small
// patch does.
struct Position {
  int64_t image, row, column;

  Position(const Plan& p, const qk_conv_args& a, int64_t index)
      : image(index / p.image), row(index % p.image / a.out_width), column(index % a.out_width) {}
  void advance(const qk_conv_args& a) {
    if (++column < a.out_width) return;
    column = 0;
    if (++row < a.out_height) return;
    row = 0;
    ++image;
  }
};

// One patch in the order of the columns. `places`: where each tap lies from the first channel on.
constexpr int64_t kOutside = INT64_MIN;

template <class Element>
void copy_patch(const uint8_t* x, const int64_t* places, int64_t taps, int64_t channels,
                int64_t channel_stride, uint8_t* patch) {
  const int64_t size = sizeof(Element);
  for (int64_t c = 0; c < channels; ++c, x += channel_stride * size)
    for (int64_t t = 0; t < taps; ++t, patch += size) {
      Element value = 0;
      if (places[t] != kOutside) std::memcpy(&value, x + places[t] * size, size);
      std::memcpy(patch, &value, size);
    }
}

// The patch of an output position: where it lies if it is dense, else gathered.
const uint8_t* patch_of(const Plan& p, const qk_conv_args& a, int64_t group, const Position& at,
                        uint8_t* ws) {
  const int64_t row = at.row * a.stride_height - a.pad_top;
  const int64_t column = at.column * a.stride_width - a.pad_left;
  const int size = dtype_size(a.x_dtype);
  const uint8_t* x = (const uint8_t*)a.x +
                     (at.image * a.x_stride[0] + group * p.group_channels * a.x_stride[1]) * size;
  int64_t* places = reinterpret_cast<int64_t*>(ws + p.taps_at);
  int64_t* place = places;
  for (int64_t i = 0; i < a.kernel_height; ++i)
    for (int64_t j = 0; j < a.kernel_width; ++j) {
      const int64_t r = row + i * a.dilation_height, c = column + j * a.dilation_width;
      const bool inside = r >= 0 && r < a.height && c >= 0 && c < a.width;
      *place++ = inside ? r * a.x_stride[2] + c * a.x_stride[3] : kOutside;
    }
  if (p.taps == 1 && a.x_stride[1] == 1 && !p.w.perm && places[0] != kOutside)
    return x + places[0] * size;
  uint8_t* patch = ws + p.patch_at;
  if (size == 4)
    copy_patch<uint32_t>(x, places, p.taps, p.group_channels, a.x_stride[1], patch);
  else
    copy_patch<uint16_t>(x, places, p.taps, p.group_channels, a.x_stride[1], patch);
  if (!p.w.perm) return patch;
  uint8_t* ordered = ws + p.ordered_at;
  gather_elements(patch, 1, p.w.perm, p.w.h.k, size, ordered);
  return ordered;
}

// A tile [rows, outputs] to y: a few channels at a time, each of which lies in one piece there.
template <class Element>
void store_tile(const uint8_t* tile, int64_t tile_stride, int64_t rows, int64_t outputs,
                const int64_t* places, int64_t channel_stride, uint8_t* y) {
  constexpr int64_t kAtOnce = 8;
  const int64_t size = sizeof(Element);
  for (int64_t n = 0; n < outputs; n += kAtOnce)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = n; i < min64(n + kAtOnce, outputs); ++i)
        std::memcpy(y + (places[r] + i * channel_stride) * size,
                    tile + (r * tile_stride + i) * size, size);
}

// Rows of a block that are ready, panels [p0, p1): results of one group to y through a tile.
void multiply_apart(const Plan& p, const qk_conv_args& a, LinearJob job, int64_t first,
                    int64_t group, int64_t p0, int64_t p1, uint8_t* ws) {
  const int size = dtype_size(a.y_dtype);
  int64_t* places = reinterpret_cast<int64_t*>(ws + p.places_at);
  Position at(p, a, first);
  for (int64_t r = 0; r < job.m; ++r, at.advance(a))
    places[r] = at.image * a.y_stride[0] + at.row * a.y_stride[2] + at.column * a.y_stride[3];
  uint8_t* tile = ws + p.tile_at;
  job.y_stride = min64(p.most_panels, kTilePanels) * p.panel_outputs;
  const int64_t begin = group * p.group_outputs, end = begin + p.group_outputs;
  for (int64_t panel = p0; panel < p1; panel += kTilePanels) {
    const int64_t last = min64(panel + kTilePanels, p1);
    const int64_t column = panel * p.panel_outputs;  // of the weight, where the tile begins
    job.y = tile - column * size;
    p.kernel->linear(job, 0, job.m, panel, last);
    const int64_t from = max64(begin, column), to = min64(end, last * p.panel_outputs);
    const uint8_t* kept = tile + (from - column) * size;
    uint8_t* y = (uint8_t*)a.y + from * a.y_stride[1] * size;
    if (size == 4)
      store_tile<uint32_t>(kept, job.y_stride, job.m, to - from, places, a.y_stride[1], y);
    else
      store_tile<uint16_t>(kept, job.y_stride, job.m, to - from, places, a.y_stride[1], y);
  }
}

// One block of one group, a part of its panels.
void run_unit(const Plan& p, const qk_conv_args& a, const float* bias, int64_t block, int64_t group,
              int64_t split, uint8_t* ws) {
  const int64_t first = block * p.rows.rows;
  const int64_t rows = min64(p.rows.rows, p.positions - first);
  Position at(p, a, first);
  for (int64_t r = 0; r < rows; ++r, at.advance(a))
    prepare_row(p.rows, p.w, patch_of(p, a, group, at, ws), a.x_dtype, ws, r);
  LinearJob job = job_of(p.rows, p.w, ws, 0, rows);
  job.bias = bias;
  job.y_dtype = a.y_dtype;
  const int64_t begin = group * p.group_outputs / p.panel_outputs;
  const int64_t panels = ceil_div((group + 1) * p.group_outputs, p.panel_outputs) - begin;
  const int64_t p0 = begin + panels * split / p.splits;
  const int64_t p1 = begin + panels * (split + 1) / p.splits;
  if (!p.direct) return multiply_apart(p, a, job, first, group, p0, p1, ws);
  job.y_stride = position_stride(a);
  job.y = (uint8_t*)a.y + first * job.y_stride * dtype_size(a.y_dtype);
  p.kernel->linear(job, 0, rows, p0, p1);
}

void run(const Plan& p, const qk_conv_args& a, uint8_t* ws) {
  const float* bias =
      float_bias(a.bias, a.bias_dtype, p.w.h.n, reinterpret_cast<float*>(ws + p.bias_at));
  const int64_t units = p.blocks * a.groups * p.splits;
  // Neighbours share what they read of x: all groups of a position, or all positions of a group.
  const bool channels_last = a.x_stride[1] == 1;
  parallel_for(a.parallel, p.tasks, [&](int64_t t) {
    uint8_t* scratch = ws + t * p.task_bytes;
    for (int64_t u = units * t / p.tasks; u < units * (t + 1) / p.tasks; ++u) {
      const int64_t pair = u / p.splits;
      const int64_t block = channels_last ? pair / a.groups : pair % p.blocks;
      const int64_t group = channels_last ? pair % a.groups : pair / p.blocks;
      run_unit(p, a, bias, block, group, u % p.splits, scratch);
    }
  });
  set_last_kernel(p.kernel->name);
}

}  // namespace
}  // namespace qkern

using namespace qkern;

extern "C" {

qk_status qk_conv_workspace(const qk_conv_args* args, int64_t* bytes) {
  qk_conv_args a;
  if (qk_status s = read_args(args, &a)) return s;
  if (!bytes) return fail(QK_INVALID_ARGUMENT, "qk_conv_workspace: bytes must not be NULL");
  Plan plan = {};
  if (qk_status s = make_plan(a, &plan)) return s;
  *bytes = plan.bytes;
  return QK_OK;
}

qk_status qk_conv(const qk_conv_args* args) {
  qk_conv_args a;
  if (qk_status s = read_args(args, &a)) return s;
  Plan plan = {};
  if (qk_status s = make_plan(a, &plan)) return s;
  if (plan.positions == 0) return QK_OK;
  qk_status status = QK_OK;
  uint8_t* ws = workspace_of("qk_conv", a.workspace, a.workspace_bytes, plan.bytes, &status);
  if (!ws) return status;
  run(plan, a, ws);
  return QK_OK;
}
}
