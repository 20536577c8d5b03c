// SPDX-License-Identifier: Apache-2.0
// y = x . W^T + bias: checks, makes the activations ready, spreads the rectangle over threads.
//
// Activations are made ready once per call (int8 codes, or float32 in packed column order; float32
// input that already lies so is used in place). Rows go in blocks so that scratch stays bounded.
// Threads take ranges of panels; where there are fewer panels than threads they take rows too.
// No split runs along K, so that no result depends on it.

#include "activations.h"
#include "error.h"
#include "kernels.h"
#include "parallel.h"
#include "structs.h"

namespace qkern {
namespace {

constexpr int64_t kRowBlock = 1024;  // rows made ready at a time
// Below this many multiply-adds a second thread costs more (a few microseconds) than it brings.
constexpr int64_t kSerialWork = 1 << 16;
constexpr int64_t kSerialElements = 1 << 13;  // the same for preparing activations
constexpr int64_t kFewRows = 4;               // read in place wherever they lie

struct Plan {
  Packed w;
  const KernelRow* kernel;
  RowLayout rows;
  bool in_place;  // float32 rows are used where they lie
  int threads;    // asked once: what is planned for them must hold for what runs
  int64_t bias_at, gather_at, bytes;  // offsets into the workspace, which the rows begin
};

// Rows this many bytes apart land in a few cache sets, which hold 8 to 12 of them.
bool shares_cache_sets(int64_t bytes) {
  const int64_t offset = bytes & 4095;
  return offset < 64 || offset > 4096 - 64;
}

// The caller's arguments in `a`, checked.
qk_status read_args(const qk_linear_args* args, qk_linear_args* a) {
  if (qk_status s = read_struct("qk_linear_args", args, a)) return s;
  if (qk_status s = check_parallel(a->parallel)) return s;
  if (!is_float(a->x_dtype) || !is_float(a->y_dtype) || (a->bias && !is_float(a->bias_dtype)))
    return fail(QK_INVALID_ARGUMENT,
                "qk_linear: x, bias and y must be float32, float16 or bfloat16");
  if (a->m < 0)
    return fail(QK_INVALID_ARGUMENT, "qk_linear: m must not be negative, got %lld",
                (long long)a->m);
  if (a->m > 0 && (!a->x || !a->y))
    return fail(QK_INVALID_ARGUMENT, "qk_linear: x and y must not be NULL");
  return QK_OK;
}

qk_status make_plan(const qk_linear_args& a, Plan* plan) {
  Plan& p = *plan;
  if (qk_status s = packed_open(a.packed, a.packed_bytes, &p.w)) return s;
  const PackedHeader& h = p.w.h;
  if (a.m > 1 && a.y_row_stride < h.n)
    return fail(QK_INVALID_ARGUMENT,
                "qk_linear: rows of y need %lld elements, their stride is %lld", (long long)h.n,
                (long long)a.y_row_stride);
  qk_status status = QK_OK;
  p.kernel = select_linear(p.w, a.kernel, &status);
  if (!p.kernel) return status;
  p.in_place = h.activations == QK_ACT_FLOAT && a.x_dtype == QK_F32 && a.x_col_stride == 1 &&
               !p.w.perm && p.w.k_padded == h.k && reinterpret_cast<uintptr_t>(a.x) % 4 == 0 &&
               (a.m <= kFewRows || !shares_cache_sets(a.x_row_stride * 4));
  p.rows = row_layout(p.w, min64(a.m, kRowBlock), !p.in_place);
  p.bias_at = p.rows.bytes;
  p.gather_at = p.bias_at + (copies_bias(a.bias, a.bias_dtype) ? round_up(h.n * 4, 64) : 0);
  // One dense row per task of preparation, where rows are not dense in input order.
  p.threads = parallel_threads(a.parallel);
  const bool gathers = !p.in_place && (a.x_col_stride != 1 || p.w.perm);
  const int64_t tasks = gathers ? min64(p.rows.rows, p.threads) : 0;
  p.bytes = p.gather_at + tasks * round_up(h.k * dtype_size(a.x_dtype), 64);
  return QK_OK;
}

const uint8_t* row_of(const qk_linear_args& a, int64_t r) {
  return (const uint8_t*)a.x + r * a.x_row_stride * dtype_size(a.x_dtype);
}

// Rows [r0, r1) of the block that begins at row `begin` of x.
void prepare_rows(const Plan& p, const qk_linear_args& a, uint8_t* ws, int64_t begin, int64_t r0,
                  int64_t r1, int64_t task) {
  const int size = dtype_size(a.x_dtype);
  uint8_t* gathered = ws + p.gather_at + task * round_up(p.w.h.k * size, 64);
  for (int64_t r = r0; r < r1; ++r) {
    const uint8_t* row = row_of(a, begin + r);
    if (p.in_place) {
      sum_row(p.rows, p.w, reinterpret_cast<const float*>(row), ws, r);
      continue;
    }
    if (a.x_col_stride != 1 || p.w.perm) {
      gather_elements(row, a.x_col_stride, p.w.perm, p.w.h.k, size, gathered);
      row = gathered;
    }
    prepare_row(p.rows, p.w, row, a.x_dtype, ws, r);
  }
}

// Panels to threads; with fewer panels than threads, rows too.
void run_kernel(const Plan& p, const LinearJob& job, const qk_parallel* parallel, int threads) {
  const int64_t panels = p.w.panel_count;
  const int64_t columns = min64(panels, threads);
  const int64_t rows = panels < threads ? min64(job.m, threads / panels) : 1;
  parallel_for(parallel, columns * rows, [&](int64_t t) {
    const int64_t c = t % columns, r = t / columns;
    p.kernel->linear(job, job.m * r / rows, job.m * (r + 1) / rows, panels * c / columns,
                     panels * (c + 1) / columns);
  });
}

void run(const Plan& p, const qk_linear_args& a, uint8_t* ws) {
  const PackedHeader& h = p.w.h;
  const float* bias =
      float_bias(a.bias, a.bias_dtype, h.n, reinterpret_cast<float*>(ws + p.bias_at));
  const int threads = p.threads;
  for (int64_t begin = 0; begin < a.m; begin += p.rows.rows) {
    const int64_t rows = min64(p.rows.rows, a.m - begin);
    if (!p.in_place || p.rows.sums) {
      const int64_t tasks = rows * h.k < kSerialElements ? 1 : min64(rows, threads);
      parallel_for(a.parallel, tasks, [&](int64_t t) {
        prepare_rows(p, a, ws, begin, rows * t / tasks, rows * (t + 1) / tasks, t);
      });
    }
    LinearJob job = job_of(p.rows, p.w, ws, 0, rows);
    if (p.in_place) {
      job.x = reinterpret_cast<const float*>(row_of(a, begin));
      job.x_stride = a.x_row_stride;
    }
    job.bias = bias;
    job.y = (uint8_t*)a.y + begin * a.y_row_stride * dtype_size(a.y_dtype);
    job.y_dtype = a.y_dtype;
    job.y_stride = a.y_row_stride;
    run_kernel(p, job, a.parallel, rows * h.n * h.k < kSerialWork ? 1 : threads);
  }
  set_last_kernel(p.kernel->name);
}

}  // namespace
}  // namespace qkern

using namespace qkern;

extern "C" {

qk_status qk_linear_workspace(const qk_linear_args* args, int64_t* bytes) {
  qk_linear_args a;
  if (qk_status s = read_args(args, &a)) return s;
  if (!bytes) return fail(QK_INVALID_ARGUMENT, "qk_linear_workspace: bytes must not be NULL");
  Plan plan = {};
  if (qk_status s = make_plan(a, &plan)) return s;
  *bytes = plan.bytes;
  return QK_OK;
}

qk_status qk_linear(const qk_linear_args* args) {
  qk_linear_args a;
  if (qk_status s = read_args(args, &a)) return s;
  Plan plan = {};
  if (qk_status s = make_plan(a, &plan)) return s;
  if (a.m == 0) return QK_OK;
  qk_status status = QK_OK;
  uint8_t* ws = workspace_of("qk_linear", a.workspace, a.workspace_bytes, plan.bytes, &status);
  if (!ws) return status;
  run(plan, a, ws);
  return QK_OK;
}
}
