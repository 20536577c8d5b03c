// SPDX-License-Identifier: Apache-2.0
// y = x . W^T + bias: checks, makes the activations ready, spreads the rectangle over threads.
//
// Activations are made ready once per call (int8 codes, or float32 in packed column order; float32
// input that already lies so is used in place). Rows go in blocks so that scratch stays bounded.
// Threads take ranges of panels; where there are fewer panels than threads they take rows too.
// No split runs along K, so that no result depends on it.

#include <cstring>
#include <new>

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
  const KernelRow* quantize;
  const KernelRow* convert;
  bool int8;
  bool in_place;  // float32 rows are used where they lie
  bool sums;      // x_sum is needed
  int64_t rows;   // of a block
  int threads;    // asked once: what is planned for them must hold for what runs
  int64_t chunk, chunks_per_group, chunks, scales;
  int64_t row_stride;  // elements of a prepared row
  // Offsets into the workspace.
  int64_t rows_at, scales_at, init_at, sums_at, bias_at, gather_at, bytes;
};

// Rows this many bytes apart land in a few cache sets, which hold 8 to 12 of them.
bool shares_cache_sets(int64_t bytes) {
  const int64_t offset = bytes & 4095;
  return offset < 64 || offset > 4096 - 64;
}

bool is_float(qk_dtype d) { return d == QK_F32 || d == QK_F16 || d == QK_BF16; }

// Kernels read a float32 bias where it lies, if it lies as a float does.
bool copies_bias(const qk_linear_args& a) {
  return a.bias && (a.bias_dtype != QK_F32 || reinterpret_cast<uintptr_t>(a.bias) % 4 != 0);
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
  p.quantize = &select_row(Op::kQuantize);
  p.convert = &select_row(Op::kConvert);
  p.int8 = h.activations != QK_ACT_FLOAT;
  p.sums = h.zero_stored >= 0;
  p.rows = min64(a.m, kRowBlock);
  const bool grouped = h.activations == QK_ACT_INT8_GROUP;
  p.chunk = !p.int8          ? kFloatChunk
            : !grouped       ? kIntChunk
            : p.w.groups > 1 ? p.w.group_padded
                             : round_up(kActivationGroup, p.w.unit);
  p.chunks_per_group = ceil_div(p.w.group_padded, p.chunk);
  p.chunks = (p.w.groups - 1) * p.chunks_per_group + ceil_div(p.w.last_padded, p.chunk);
  p.scales = grouped ? p.chunks : 1;
  p.in_place = !p.int8 && a.x_dtype == QK_F32 && a.x_col_stride == 1 && !p.w.perm &&
               p.w.k_padded == h.k && reinterpret_cast<uintptr_t>(a.x) % 4 == 0 &&
               (a.m <= kFewRows || !shares_cache_sets(a.x_row_stride * 4));
  // 64 bytes more than the columns: rows then never lie a multiple of 4 KiB apart, where they
  // would share cache sets.
  p.row_stride = p.int8 ? round_up(p.w.k_padded, 64) + kReadPadding
                        : round_up(p.w.k_padded, 16) + kReadPadding / 4;
  int64_t at = 0;
  auto take = [&](int64_t bytes) {
    const int64_t begin = at;
    at = round_up(at + bytes, 64);
    return begin;
  };
  p.rows_at = take(p.in_place ? 0 : p.rows * p.row_stride * (p.int8 ? 1 : 4));
  p.scales_at = take(p.int8 ? p.rows * p.scales * 4 : 0);
  p.init_at = take(p.int8 ? p.rows * p.chunks * 4 : 0);
  p.sums_at = take(p.sums ? p.rows * p.chunks * 4 : 0);
  p.bias_at = take(copies_bias(a) ? h.n * 4 : 0);
  // One dense row per task of preparation, where rows are not dense in input order.
  p.threads = parallel_threads(a.parallel);
  p.gather_at = take(p.in_place || (a.x_col_stride == 1 && !p.w.perm)
                         ? 0
                         : min64(p.rows, p.threads) * round_up(h.k * dtype_size(a.x_dtype), 64));
  p.bytes = at;
  return QK_OK;
}

// Scratch that the library keeps for a thread that brings none.
struct Scratch {
  void* data = nullptr;
  int64_t bytes = 0;

  void* at_least(int64_t wanted) {
    if (wanted > bytes) {
      ::operator delete(data, std::align_val_t(64));
      data = ::operator new((size_t)wanted, std::align_val_t(64), std::nothrow);
      bytes = data ? wanted : 0;
    }
    return data;
  }
  ~Scratch() { ::operator delete(data, std::align_val_t(64)); }
};

thread_local Scratch scratch;

// The row in input order: where it lies if it is dense, else copied (permuted) to `dense`.
const uint8_t* dense_row(const qk_linear_args& a, const Packed& w, const uint8_t* row,
                         uint8_t* dense) {
  if (a.x_col_stride == 1 && !w.perm) return row;
  const int64_t step = a.x_col_stride;
  for (int64_t k = 0; k < w.h.k; ++k) {
    const int64_t from = (w.perm ? w.perm[k] : k) * step;
    if (dtype_size(a.x_dtype) == 4)
      std::memcpy(dense + 4 * k, row + 4 * from, 4);
    else
      std::memcpy(dense + 2 * k, row + 2 * from, 2);
  }
  return dense;
}

int32_t sum_int8(const int8_t* q, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += q[i];
  return sum;
}

// Sixteen partial sums, folded in order: the lane sum of the contract.
float lane_sum(const float* x, int64_t count) {
  float lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int l = 0; l < 16; ++l) lanes[l] += x[i + l];
  for (int l = 0; i + l < count; ++l) lanes[l] += x[i + l];
  float sum = lanes[0];
  for (int l = 1; l < 16; ++l) sum += lanes[l];
  return sum;
}

// Calls fn(chunk index, first packed column, columns) for every chunk of a row.
template <class Fn>
void for_chunks(const Plan& p, const Fn& fn) {
  for (int64_t g = 0; g < p.w.groups; ++g) {
    const int64_t columns = p.w.group_columns_padded(g);
    for (int64_t c = 0; c * p.chunk < columns; ++c)
      fn(g * p.chunks_per_group + c, g * p.w.group_padded + c * p.chunk,
         min64(p.chunk, columns - c * p.chunk));
  }
}

void prepare_int8(const Plan& p, const void* dense, qk_dtype dtype, int8_t* q, float* scales,
                  int32_t* init, float* sums) {
  const Packed& w = p.w;
  const bool grouped = w.h.activations == QK_ACT_INT8_GROUP;
  const int64_t group = !grouped ? w.h.k : w.groups > 1 ? w.h.group : p.chunk;
  if (grouped || w.groups == 1 || w.group_padded == w.h.group) {
    const int64_t stride = grouped && w.groups > 1 ? w.group_padded : group;
    p.quantize->quantize(dense, dtype, w.h.k, group, q, stride, scales);
  } else {
    // One scale for the row, but padded groups: quantize densely, then spread from the back.
    p.quantize->quantize(dense, dtype, w.h.k, w.h.k, q, w.h.k, scales);
    for (int64_t g = w.groups - 1; g > 0; --g)
      std::memmove(q + g * w.group_padded, q + g * w.h.group, (size_t)w.group_columns(g));
  }
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t columns = w.group_columns(g);
    std::memset(q + g * w.group_padded + columns, 0, (size_t)(w.group_columns_padded(g) - columns));
  }
  std::memset(q + w.k_padded, 0, (size_t)(p.row_stride - w.k_padded));
  for (int64_t i = 0; i < p.scales; ++i) scales[i] *= w.h.table_scale;
  const int32_t offset = code_offset(w);
  for_chunks(p, [&](int64_t chunk, int64_t column, int64_t columns) {
    const int32_t sum = sum_int8(q + column, columns);
    // A sum that a valid column count allows can still exceed int32 when multiplied; the wrapped
    // value is what wrapping accumulation needs.
    init[chunk] = (int32_t)(0u - (uint32_t)offset * (uint32_t)sum);
    if (sums) sums[chunk] = (float)sum;
  });
}

void prepare_float(const Plan& p, const void* dense, qk_dtype dtype, float* x) {
  const Packed& w = p.w;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t columns = w.group_columns(g), padded = w.group_columns_padded(g);
    float* to = x + g * w.group_padded;
    if (dtype == QK_F32)
      std::memcpy(to, (const float*)dense + g * w.h.group, (size_t)columns * 4);
    else if (w.group_padded != w.h.group || g == 0) {
      // Converted in one piece where groups are not padded.
      const int64_t count = w.group_padded != w.h.group ? columns : w.h.k;
      p.convert->convert((const uint16_t*)dense + g * w.h.group, dtype, count, to);
    }
    std::memset(to + columns, 0, (size_t)(padded - columns) * 4);
  }
  std::memset(x + w.k_padded, 0, (size_t)(p.row_stride - w.k_padded) * 4);
}

void prepare_rows(const Plan& p, const qk_linear_args& a, uint8_t* ws, int64_t block_begin,
                  int64_t r0, int64_t r1, int64_t task) {
  const int size = dtype_size(a.x_dtype);
  uint8_t* gather = ws + p.gather_at + task * round_up(p.w.h.k * size, 64);
  for (int64_t r = r0; r < r1; ++r) {
    const uint8_t* row = (const uint8_t*)a.x + (block_begin + r) * a.x_row_stride * size;
    float* sums = p.sums ? reinterpret_cast<float*>(ws + p.sums_at) + r * p.chunks : nullptr;
    const float* x = reinterpret_cast<const float*>(row);
    if (!p.in_place) {
      const uint8_t* dense = dense_row(a, p.w, row, gather);
      if (p.int8) {
        prepare_int8(p, dense, a.x_dtype, (int8_t*)ws + p.rows_at + r * p.row_stride,
                     (float*)(ws + p.scales_at) + r * p.scales,
                     (int32_t*)(ws + p.init_at) + r * p.chunks, sums);
        continue;
      }
      float* ready = reinterpret_cast<float*>(ws + p.rows_at) + r * p.row_stride;
      prepare_float(p, dense, a.x_dtype, ready);
      x = ready;
    }
    if (sums)
      for_chunks(p, [&](int64_t chunk, int64_t column, int64_t columns) {
        sums[chunk] = lane_sum(x + column, columns);
      });
  }
}

LinearJob make_job(const Plan& p, const qk_linear_args& a, uint8_t* ws, int64_t block_begin,
                   int64_t rows) {
  LinearJob job = {};
  job.w = &p.w;
  job.m = rows;
  job.chunk = p.chunk;
  job.chunks_per_group = p.chunks_per_group;
  job.chunks = p.chunks;
  if (p.int8) {
    job.q = (const int8_t*)(ws + p.rows_at);
    job.q_stride = p.row_stride;
    job.q_scale = (const float*)(ws + p.scales_at);
    job.q_init = (const int32_t*)(ws + p.init_at);
  } else if (p.in_place) {
    job.x = (const float*)a.x + block_begin * a.x_row_stride;
    job.x_stride = a.x_row_stride;
  } else {
    job.x = (const float*)(ws + p.rows_at);
    job.x_stride = p.row_stride;
  }
  job.x_sum = p.sums ? (const float*)(ws + p.sums_at) : nullptr;
  job.bias = copies_bias(a) ? (const float*)(ws + p.bias_at) : (const float*)a.bias;
  job.y = (uint8_t*)a.y + block_begin * a.y_row_stride * dtype_size(a.y_dtype);
  job.y_dtype = a.y_dtype;
  job.y_stride = a.y_row_stride;
  return job;
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
  if (copies_bias(a))
    for (int64_t i = 0; i < p.w.h.n; ++i)
      ((float*)(ws + p.bias_at))[i] = load_float(a.bias, a.bias_dtype, i);
  const int threads = p.threads;
  for (int64_t begin = 0; begin < a.m; begin += p.rows) {
    const int64_t rows = min64(p.rows, a.m - begin);
    if (!p.in_place || p.sums) {
      const int64_t tasks = rows * p.w.h.k < kSerialElements ? 1 : min64(rows, threads);
      parallel_for(a.parallel, tasks, [&](int64_t t) {
        prepare_rows(p, a, ws, begin, rows * t / tasks, rows * (t + 1) / tasks, t);
      });
    }
    const LinearJob job = make_job(p, a, ws, begin, rows);
    run_kernel(p, job, a.parallel, rows * p.w.h.n * p.w.h.k < kSerialWork ? 1 : threads);
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
  void* workspace = a.workspace;
  if (!workspace)
    workspace = scratch.at_least(plan.bytes);
  else if (a.workspace_bytes < plan.bytes || reinterpret_cast<uintptr_t>(workspace) % 64)
    return fail(QK_INVALID_ARGUMENT,
                "qk_linear: expected a 64-byte aligned workspace of %lld bytes, got %lld bytes",
                (long long)plan.bytes, (long long)a.workspace_bytes);
  if (!workspace && plan.bytes)
    return fail(QK_OUT_OF_MEMORY, "qk_linear: no memory for %lld bytes of scratch",
                (long long)plan.bytes);
  run(plan, a, static_cast<uint8_t*>(workspace));
  return QK_OK;
}
}
