// SPDX-License-Identifier: Apache-2.0
// qk_quantize_activations: checks, dense rows, threads.

#include <cstring>
#include <new>

#include "error.h"
#include "kernels.h"
#include "parallel.h"
#include "structs.h"

using namespace qkern;

extern "C" qk_status qk_quantize_activations(const qk_quantize_args* args) {
  qk_quantize_args known;
  if (qk_status s = read_struct("qk_quantize_args", args, &known)) return s;
  if (qk_status s = check_parallel(known.parallel)) return s;
  const qk_quantize_args* a = &known;
  if (a->x_dtype != QK_F32 && a->x_dtype != QK_F16 && a->x_dtype != QK_BF16)
    return fail(QK_INVALID_ARGUMENT,
                "qk_quantize_activations: x must be float32, float16 or bfloat16");
  if (a->m < 0 || a->k < 0 || a->group < 0)
    return fail(
        QK_INVALID_ARGUMENT,
        "qk_quantize_activations: m, k and group must not be negative, got %lld, %lld, %lld",
        (long long)a->m, (long long)a->k, (long long)a->group);
  if (a->m == 0 || a->k == 0) return QK_OK;
  if (!a->x || !a->q || !a->scales)
    return fail(QK_INVALID_ARGUMENT, "qk_quantize_activations: x, q and scales must not be NULL");
  if (a->m > 1 && a->q_row_stride < a->k)
    return fail(QK_INVALID_ARGUMENT,
                "qk_quantize_activations: rows of q need %lld elements, their stride is %lld",
                (long long)a->k, (long long)a->q_row_stride);
  qk_status status = QK_OK;
  const KernelRow* kernel = select_named(Op::kQuantize, a->kernel, &status);
  if (!kernel) return status;

  const int64_t group = a->group > 0 && a->group < a->k ? a->group : a->k;
  const int64_t groups = ceil_div(a->k, group), size = dtype_size(a->x_dtype);
  const int64_t tasks = a->m * a->k < 1 << 13 ? 1 : min64(a->m, parallel_threads(a->parallel));
  const bool dense = a->x_col_stride == 1;
  uint8_t* copies = nullptr;
  if (!dense) {
    copies = new (std::nothrow) uint8_t[(size_t)(tasks * a->k * size)];
    if (!copies)
      return fail(QK_OUT_OF_MEMORY, "qk_quantize_activations: no memory for %lld bytes",
                  (long long)(tasks * a->k * size));
  }
  parallel_for(a->parallel, tasks, [&](int64_t t) {
    for (int64_t r = a->m * t / tasks; r < a->m * (t + 1) / tasks; ++r) {
      const uint8_t* row = (const uint8_t*)a->x + r * a->x_row_stride * size;
      if (!dense) {
        uint8_t* copy = copies + t * a->k * size;
        for (int64_t k = 0; k < a->k; ++k)
          std::memcpy(copy + k * size, row + k * a->x_col_stride * size, (size_t)size);
        row = copy;
      }
      kernel->quantize(row, a->x_dtype, a->k, group, a->q + r * a->q_row_stride, group,
                       a->scales + r * groups);
    }
  });
  delete[] copies;
  set_last_kernel(kernel->name);
  return QK_OK;
}
