// SPDX-License-Identifier: Apache-2.0
// Mixture of experts: rows sorted by expert, each times the weight of its expert. Activations are
// made ready as for `linear`, each row for its own expert; threads then share the (expert, panel)
// pairs evenly by what they cost.

#include "activations.h"
#include "error.h"
#include "parallel.h"
#include "structs.h"

namespace qkern {
namespace {

constexpr int64_t kRowBlock = 1024;  // rows made ready at a time
constexpr int64_t kSerialWork = 1 << 16, kSerialElements = 1 << 13;
// Reading the codes of a panel costs as much as this many rows do.
constexpr int64_t kPanelRows = 4;

// One expert that has rows.
struct Expert {
  Packed w;
  const KernelRow* kernel;
  int64_t index, begin, end;  // rows of x
};

struct Plan {
  PackedHeader first;  // what all experts share
  RowLayout rows;
  int64_t tasks;
  int64_t experts_at, bias_at, gather_at, gather_bytes, bytes;
};

// The caller's arguments in `a`, checked.
qk_status read_args(const qk_grouped_linear_args* args, qk_grouped_linear_args* a) {
  if (qk_status s = read_struct("qk_grouped_linear_args", args, a)) return s;
  if (qk_status s = check_parallel(a->parallel)) return s;
  if (!is_float(a->x_dtype) || !is_float(a->y_dtype) || (a->bias && !is_float(a->bias_dtype)))
    return fail(QK_INVALID_ARGUMENT,
                "qk_grouped_linear: x, bias and y must be float32, float16 or bfloat16");
  if (a->m < 0 || a->experts < 1)
    return fail(QK_INVALID_ARGUMENT,
                "qk_grouped_linear: m is at least 0 and experts at least 1, got %lld and %lld",
                (long long)a->m, (long long)a->experts);
  if (!a->offsets || (a->m > 0 && (!a->x || !a->y)))
    return fail(QK_INVALID_ARGUMENT, "qk_grouped_linear: offsets, x and y must not be NULL");
  if (a->offsets[0] != 0 || a->offsets[a->experts] != a->m)
    return fail(QK_INVALID_ARGUMENT,
                "qk_grouped_linear: offsets go from 0 to the %lld rows of x, got %lld to %lld",
                (long long)a->m, (long long)a->offsets[0], (long long)a->offsets[a->experts]);
  for (int64_t e = 0; e < a->experts; ++e)
    if (a->offsets[e] > a->offsets[e + 1])
      return fail(QK_INVALID_ARGUMENT, "qk_grouped_linear: offsets must not descend, as at %lld",
                  (long long)e);
  return QK_OK;
}

bool same_shape(const PackedHeader& a, const PackedHeader& b) {
  return a.n == b.n && a.k == b.k && a.group == b.group && a.kind == b.kind && a.bits == b.bits &&
         a.activations == b.activations && a.table_per == b.table_per && a.lanes == b.lanes &&
         (a.zero_stored < 0) == (b.zero_stored < 0);
}

// Calls fn(e, weight) for the weights of all experts.
template <class Fn>
qk_status for_experts(const qk_grouped_linear_args& a, const Fn& fn) {
  const uint8_t* packed = static_cast<const uint8_t*>(a.packed);
  int64_t left = a.packed_bytes;
  for (int64_t e = 0; e < a.experts; ++e) {
    Packed w;
    if (qk_status s = packed_open(packed, left, &w)) return s;
    if (qk_status s = fn(e, w)) return s;
    const int64_t step = round_up(w.h.total_bytes, 64);
    packed += step;
    left -= step;
  }
  return QK_OK;
}

qk_status make_plan(const qk_grouped_linear_args& a, Plan* plan) {
  Plan& p = *plan;
  Packed w;
  if (qk_status s = packed_open(a.packed, a.packed_bytes, &w)) return s;
  p.first = w.h;
  if (a.m > 1 && a.y_row_stride < w.h.n)
    return fail(QK_INVALID_ARGUMENT,
                "qk_grouped_linear: rows of y need %lld elements, their stride is %lld",
                (long long)w.h.n, (long long)a.y_row_stride);
  p.rows = row_layout(w, min64(a.m, kRowBlock), true);
  p.tasks = parallel_threads(a.parallel);
  p.experts_at = p.rows.bytes;
  p.bias_at = p.experts_at + round_up(min64(a.experts, a.m) * (int64_t)sizeof(Expert), 64);
  const bool convert = copies_bias(a.bias, a.bias_dtype);
  p.gather_at = p.bias_at + (convert ? round_up(a.experts * w.h.n * 4, 64) : 0);
  p.gather_bytes = round_up(w.h.k * dtype_size(a.x_dtype), 64);
  p.bytes = p.gather_at + p.tasks * p.gather_bytes;
  return QK_OK;
}

// The experts that have rows, in order; their number in *count.
qk_status open_experts(const Plan& p, const qk_grouped_linear_args& a, Expert* experts,
                       int64_t* count) {
  *count = 0;
  return for_experts(a, [&](int64_t e, const Packed& w) {
    if (!same_shape(p.first, w.h))
      return fail(QK_INVALID_ARGUMENT,
                  "qk_grouped_linear: expert %lld has another format or shape than expert 0",
                  (long long)e);
    if (a.offsets[e] == a.offsets[e + 1]) return (qk_status)QK_OK;
    qk_status status = QK_OK;
    const KernelRow* kernel = select_linear(w, a.kernel, &status);
    if (kernel) experts[(*count)++] = {w, kernel, e, a.offsets[e], a.offsets[e + 1]};
    return status;
  });
}

// Makes rows [r0, r1) of the block at `begin` ready; `expert` is the first that has rows in it.
void prepare_rows(const Plan& p, const qk_grouped_linear_args& a, const Expert* expert, uint8_t* ws,
                  int64_t begin, int64_t r0, int64_t r1, int64_t task) {
  const int size = dtype_size(a.x_dtype);
  uint8_t* gathered = ws + p.gather_at + task * p.gather_bytes;
  for (int64_t r = r0; r < r1; ++r) {
    while (begin + r >= expert->end) ++expert;
    const Packed& w = expert->w;
    const uint8_t* row = (const uint8_t*)a.x + (begin + r) * a.x_row_stride * size;
    if (a.x_col_stride != 1 || w.perm) {
      gather_elements(row, a.x_col_stride, w.perm, w.h.k, size, gathered);
      row = gathered;
    }
    prepare_row(p.rows, w, row, a.x_dtype, ws, r);
  }
}

// The rows of one expert within a block, times panels [p0, p1).
void multiply(const Plan& p, const qk_grouped_linear_args& a, const Expert& expert, uint8_t* ws,
              const float* bias, int64_t begin, int64_t from, int64_t to, int64_t p0, int64_t p1) {
  LinearJob job = job_of(p.rows, expert.w, ws, from - begin, to - from);
  job.bias = bias ? bias + expert.index * expert.w.h.n : nullptr;
  job.y = (uint8_t*)a.y + from * a.y_row_stride * dtype_size(a.y_dtype);
  job.y_dtype = a.y_dtype;
  job.y_stride = a.y_row_stride;
  expert.kernel->linear(job, 0, job.m, p0, p1);
}

// A block of rows [begin, end), the experts [first, last) have rows in it.
void run_block(const Plan& p, const qk_grouped_linear_args& a, const Expert* first,
               const Expert* last, uint8_t* ws, const float* bias, int64_t begin, int64_t end) {
  const int64_t rows = end - begin, k = p.first.k;
  const int64_t ready = rows * k < kSerialElements ? 1 : min64(rows, p.tasks);
  parallel_for(a.parallel, ready, [&](int64_t t) {
    prepare_rows(p, a, first, ws, begin, rows * t / ready, rows * (t + 1) / ready, t);
  });
  const int64_t panels = first->w.panel_count;
  const int64_t cost = (rows + (last - first) * kPanelRows) * panels;
  const int64_t tasks = rows * p.first.n * k < kSerialWork ? 1 : min64(p.tasks, cost);
  parallel_for(a.parallel, tasks, [&](int64_t t) {
    // The panels whose cost begins within this task's share of the whole.
    const int64_t low = cost * t / tasks, high = cost * (t + 1) / tasks;
    int64_t before = 0;
    for (const Expert* e = first; e < last && before < high; ++e) {
      const int64_t from = max64(begin, e->begin), to = min64(end, e->end);
      const int64_t each = to - from + kPanelRows;
      const int64_t p0 = min64(panels, ceil_div(max64(0, low - before), each));
      const int64_t p1 = min64(panels, ceil_div(high - before, each));
      if (p0 < p1) multiply(p, a, *e, ws, bias, begin, from, to, p0, p1);
      before += each * panels;
    }
  });
}

void run(const Plan& p, const qk_grouped_linear_args& a, const Expert* experts, int64_t count,
         uint8_t* ws) {
  const float* bias = float_bias(a.bias, a.bias_dtype, a.experts * p.first.n,
                                 reinterpret_cast<float*>(ws + p.bias_at));
  const Expert *first = experts, *all = experts + count;
  for (int64_t begin = 0; begin < a.m; begin += p.rows.rows) {
    const int64_t end = min64(begin + p.rows.rows, a.m);
    while (first->end <= begin) ++first;
    const Expert* last = first;
    while (last < all && last->begin < end) ++last;
    run_block(p, a, first, last, ws, bias, begin, end);
  }
  set_last_kernel(experts->kernel->name);
}

}  // namespace
}  // namespace qkern

using namespace qkern;

extern "C" {

qk_status qk_packed_size(const void* packed, int64_t bytes, int64_t* size) {
  Packed w;
  if (qk_status s = packed_open(packed, bytes, &w)) return s;
  if (!size) return fail(QK_INVALID_ARGUMENT, "qk_packed_size: size must not be NULL");
  *size = w.h.total_bytes;
  return QK_OK;
}

qk_status qk_grouped_linear_workspace(const qk_grouped_linear_args* args, int64_t* bytes) {
  qk_grouped_linear_args a;
  if (qk_status s = read_args(args, &a)) return s;
  if (!bytes)
    return fail(QK_INVALID_ARGUMENT, "qk_grouped_linear_workspace: bytes must not be NULL");
  Plan plan = {};
  if (qk_status s = make_plan(a, &plan)) return s;
  *bytes = plan.bytes;
  return QK_OK;
}

qk_status qk_grouped_linear(const qk_grouped_linear_args* args) {
  qk_grouped_linear_args a;
  if (qk_status s = read_args(args, &a)) return s;
  Plan plan = {};
  if (qk_status s = make_plan(a, &plan)) return s;
  if (a.m == 0) return QK_OK;
  qk_status status = QK_OK;
  uint8_t* ws =
      workspace_of("qk_grouped_linear", a.workspace, a.workspace_bytes, plan.bytes, &status);
  if (!ws) return status;
  Expert* experts = reinterpret_cast<Expert*>(ws + plan.experts_at);
  int64_t count = 0;
  if (qk_status s = open_experts(plan, a, experts, &count)) return s;
  run(plan, a, experts, count, ws);
  return QK_OK;
}
}
