// SPDX-License-Identifier: Apache-2.0
// Exact optimal k-means per segment (row, group of a row, or matrix): sort, join equal values, find
// the clusters (fit_cluster.h), take their means, give every weight the nearest entry.
//
// With no more distinct values than entries, the entries are those values and the last repeats.
// Else every entry is a mean rounded to float32; entries are distinct because clusters do not
// overlap. The error is that of the rounded entries.
//
// A segment's result depends on that segment alone, hence not on threads. Segments are dealt to as
// many workers as there are threads, each with its own buffers.
#include <atomic>
#include <new>

#include "fit_args.h"
#include "fit_cluster.h"
#include "fit_nearest.h"

namespace qkern {
namespace {

constexpr const char* kCall = "qk_fit_kmeans";

class Worker {
 public:
  explicit Worker(const qk_fit_kmeans_args& args)
      : a_(args), gatherer_({args.w, args.w_stride, args.importance, args.importance_row_stride}) {}

  // Fills one table; returns its error.
  double fit(const Segment& segment, float* table) {
    const int64_t size = INT64_C(1) << a_.bits;
    const Points points = gatherer_.points(segment);
    if (points.count <= size) {
      for (int64_t i = 0; i < size; ++i)
        table[i] = points.value[min64(i, (int64_t)points.count - 1)];
      return 0;
    }
    const Path& path = clusters_.fit(points, (uint32_t)size);
    double error = 0;
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t begin = path.cuts[i], end = path.cuts[i + 1];
      double weight = 0, sum = 0;
      for (uint32_t p = begin; p < end; ++p) {
        weight += points.weight[p];
        sum += points.weight[p] * points.value[p];
      }
      // A mean lies between its points, whatever rounding does.
      table[i] =
          std::min(std::max((float)(sum / weight), points.value[begin]), points.value[end - 1]);
    }
    nearest_.build(table, a_.bits);
    for (uint32_t p = 0; p < points.count; ++p) {
      const double d = (double)points.value[p] - table[nearest_.code(points.value[p])];
      error += points.weight[p] * (d * d);
    }
    return error;
  }

 private:
  const qk_fit_kmeans_args& a_;
  Gatherer gatherer_;
  Clusters clusters_;
  Nearest nearest_;
};

struct Plan {
  int64_t tables, group, groups;  // columns per table, tables per row
};

qk_status check(const qk_fit_kmeans_args& a, Plan* plan) {
  if (qk_status s = check_bits(kCall, a.bits, 1)) return s;
  if (qk_status s = check_rows(kCall, "w", a.w, a.n, a.k, a.w_stride)) return s;
  if (qk_status s = check_table_per(kCall, a.table_per)) return s;
  plan->group = a.table_per == QK_TABLE_PER_GROUP ? a.group : a.k;
  if (qk_status s = check_group(kCall, a.k, &plan->group)) return s;
  plan->groups = a.k > 0 ? ceil_div(a.k, plan->group) : 1;
  plan->tables = a.table_per == QK_TABLE_PER_TENSOR ? 1 : a.n * plan->groups;
  if (plan->tables > 0 && (a.n == 0 || a.k == 0))
    return fail(QK_INVALID_ARGUMENT,
                "%s: a table needs at least one weight, got a %lld x %lld matrix", kCall,
                (long long)a.n, (long long)a.k);
  if (a.importance && a.importance_row_stride != 0)
    if (qk_status s =
            check_rows(kCall, "importance", a.importance, a.n, a.k, a.importance_row_stride))
      return s;
  const int64_t size = INT64_C(1) << a.bits;
  if (qk_status s = check_rows(kCall, "codebook", a.codebook, plan->tables, size, size)) return s;
  return check_rows(kCall, "codes", a.codes, a.n, stream_bytes(a.k, a.bits), a.codes_stride_bytes);
}

// Fits all tables; false where memory ran out.
bool fit_tables(const qk_fit_kmeans_args& a, const Plan& plan) {
  const int64_t workers = min64(plan.tables, parallel_threads(a.parallel));
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  parallel_for(a.parallel, workers, [&](int64_t) {
    try {
      Worker worker(a);
      for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < plan.tables;) {
        if (out_of_memory.load(std::memory_order_relaxed)) return;
        const int64_t row = t / plan.groups, column = t % plan.groups * plan.group;
        const Segment segment = a.table_per == QK_TABLE_PER_TENSOR
                                    ? Segment{0, a.n, 0, a.k}
                                    : Segment{row, 1, column, min64(plan.group, a.k - column)};
        const double error = worker.fit(segment, a.codebook + (t << a.bits));
        if (a.errors) a.errors[t] = error;
      }
    } catch (const std::bad_alloc&) {
      out_of_memory.store(true);
    }
  });
  return !out_of_memory.load();
}

}  // namespace
}  // namespace qkern

using namespace qkern;

extern "C" qk_status qk_fit_kmeans(const qk_fit_kmeans_args* args) {
  qk_fit_kmeans_args a;
  if (qk_status s = read_struct("qk_fit_kmeans_args", args, &a)) return s;
  if (qk_status s = check_parallel(a.parallel)) return s;
  Plan plan;
  if (qk_status s = check(a, &plan)) return s;
  if (plan.tables == 0) return QK_OK;
  if (qk_status s = check_numbers(kCall, "w", a.parallel, a.w, a.n, a.k, a.w_stride, true))
    return s;
  if (a.importance) {
    const int64_t rows = a.importance_row_stride == 0 ? 1 : a.n;
    if (qk_status s = check_numbers(kCall, "importance", a.parallel, a.importance, rows, a.k,
                                    a.importance_row_stride, false))
      return s;
  }
  if (!fit_tables(a, plan))
    return fail(QK_OUT_OF_MEMORY,
                "%s: out of memory; a table over %lld weights needs about 72 bytes for each", kCall,
                (long long)(a.table_per == QK_TABLE_PER_TENSOR ? a.n * a.k : plan.group));
  const TableMap map = {a.codebook, a.table_per, plan.group, plan.groups, a.bits};
  Nearest first;
  first.build(a.codebook, a.bits);
  const Nearest* shared = a.table_per == QK_TABLE_PER_TENSOR ? &first : nullptr;
  parallel_for(a.parallel, a.n, [&](int64_t row) {
    encode_row(map, shared, a.w + row * a.w_stride, a.k, row, nullptr,
               a.codes + row * a.codes_stride_bytes);
  });
  return QK_OK;
}
