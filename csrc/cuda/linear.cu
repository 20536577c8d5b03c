// SPDX-License-Identifier: Apache-2.0
// qk_cuda_linear: checks, choice of the kernel, preparation of activations, launch, sum of splits.
//
// Launches, all on the caller's stream, from sizes and addresses alone:
//   1. activations: int8 ones are quantized into the workspace; 16-bit ones are gathered there only
//      where the kernel cannot read them in place (perm, padded groups, strides, alignment)
//   2. the kernel
//   3. where K is split, the partial sums are added in ascending order
//
// Compiled and host-tested (schedules, layout); no GPU has run it.

#include "launch.cuh"
#include "plan.h"
#include "prepare.h"

namespace qkern {
namespace cuda {

enum KindMask { kInt = 1 << QK_KIND_INT, kTable = 1 << QK_KIND_TABLE, kBoth = kInt | kTable };

struct Row {
  const char* name;
  int kinds, bits;
  qk_table_per table_per;
  qk_dtype activations;  // QK_I8: quantized at run time
  Launch launch;
};

#define QKERN_CUDA_LINEAR(name, kinds, bits, table_per, activations) \
  qk_status name(const LinearParams&, const Schedule&, int32_t, cudaStream_t);
#include "kernels.inc"
#undef QKERN_CUDA_LINEAR
#define QKERN_CUDA_LINEAR(name, kinds, bits, table_per, activations) \
  {#name, kinds, bits, table_per, activations, name},
static const Row kRows[] = {
#include "kernels.inc"
};
#undef QKERN_CUDA_LINEAR
constexpr int kRowCount = sizeof kRows / sizeof kRows[0];

static thread_local const char* last_kernel = nullptr;

static const Row* select(const Layout& l, qk_dtype x_dtype, qk_status* status) {
  const qk_dtype activations = l.activations == QK_ACT_FLOAT ? x_dtype : QK_I8;
  for (const Row& row : kRows)
    if (row.kinds >> l.kind & 1 && row.bits == l.bits && l.table_per <= row.table_per &&
        row.activations == activations)
      return &row;
  *status =
      l.activations == QK_ACT_FLOAT && x_dtype == QK_F32
          ? fail(QK_UNSUPPORTED,
                 "the CUDA kernels take float16 or bfloat16 activations, got float32")
          : fail(QK_UNSUPPORTED,
                 "no CUDA kernel multiplies %s weights of %d bits with %s activations; dequantize "
                 "it, or use the Triton backend",
                 l.kind == QK_KIND_INT ? "integer" : "table", l.bits,
                 activations == QK_I8 ? "int8" : "such");
  return nullptr;
}

static qk_status plan_on_device(const qk_cuda_linear_args& a, const Layout& l, Plan* plan) {
  int sms = 0;
  if (qk_status s = runtime_status(
          cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, a.device), "qk_cuda_linear"))
    return s;
  const char* const reason = make_plan(a, l, sms, plan);
  return reason ? fail(QK_UNSUPPORTED, "qk_cuda_linear: %s", reason) : QK_OK;
}

static qk_status check(const qk_cuda_linear_args* a, Layout* layout) {
  constexpr const char* kName = "qk_cuda_linear";
  if (!a || a->struct_size < sizeof(qk_cuda_linear_args))
    return fail(QK_INVALID_ARGUMENT, "%s: struct_size must be at least %zu", kName,
                sizeof(qk_cuda_linear_args));
  if (qk_status s = open_packed(kName, a->weight, a->packed, a->packed_bytes, layout)) return s;
  if (!is_float_type(a->x_dtype) || !is_float_type(a->y_dtype) ||
      (a->bias && !is_float_type(a->bias_dtype)))
    return fail(QK_INVALID_ARGUMENT, "%s: x, bias and y must be float32, float16 or bfloat16",
                kName);
  if (a->m < 0 || a->m >= (int64_t)1 << 31)
    return fail(QK_INVALID_ARGUMENT, "%s: m must lie within 0 and 2^31, got %lld", kName,
                (long long)a->m);
  return QK_OK;
}

}  // namespace cuda
}  // namespace qkern

using namespace qkern;
using namespace qkern::cuda;

extern "C" qk_status qk_cuda_linear_supported(const qk_weight* weight, qk_dtype x_dtype) {
  if (!weight || weight->struct_size < sizeof(qk_weight))
    return fail(QK_INVALID_ARGUMENT, "qk_weight.struct_size must be at least %zu",
                sizeof(qk_weight));
  Layout l;
  if (const char* reason = make_layout(*weight, &l)) return fail(QK_UNSUPPORTED, "%s", reason);
  qk_status status = QK_OK;
  select(l, x_dtype, &status);
  return status;
}

extern "C" qk_status qk_cuda_linear_workspace(const qk_cuda_linear_args* a, int64_t* bytes) {
  Layout l;
  if (qk_status s = check(a, &l)) return s;
  if (!bytes) return fail(QK_INVALID_ARGUMENT, "qk_cuda_linear_workspace: bytes must not be NULL");
  *bytes = 0;
  if (a->m == 0) return QK_OK;
  Plan plan = {};
  if (qk_status s = plan_on_device(*a, l, &plan)) return s;
  *bytes = plan.workspace();
  return QK_OK;
}

extern "C" qk_status qk_cuda_linear(const qk_cuda_linear_args* a) {
  constexpr const char* kName = "qk_cuda_linear";
  Layout l;
  if (qk_status s = check(a, &l)) return s;
  qk_status status = QK_OK;
  const Row* const row = select(l, a->x_dtype, &status);
  if (!row) return status;
  if (a->m == 0) return QK_OK;
  if (!a->x || !a->y) return fail(QK_INVALID_ARGUMENT, "%s: x and y must not be NULL", kName);
  if (a->m > 1 && a->y_row_stride < l.n)
    return fail(QK_INVALID_ARGUMENT, "%s: rows of y need %lld elements, their stride is %lld",
                kName, (long long)l.n, (long long)a->y_row_stride);
  const DeviceGuard guard(a->device);
  if (guard.error()) return runtime_status(guard.error(), kName);
  Plan plan = {};
  if (qk_status s = plan_on_device(*a, l, &plan)) return s;
  if (plan.workspace() > 0 &&
      (a->workspace_bytes < plan.workspace() || !a->workspace || (uintptr_t)a->workspace % 128))
    return fail(QK_INVALID_ARGUMENT,
                "%s: needs a workspace of %lld bytes aligned to 128, got %lld at %p", kName,
                (long long)plan.workspace(), (long long)a->workspace_bytes, a->workspace);
  const cudaStream_t stream = (cudaStream_t)a->stream;
  const LinearParams p = make_params(*a, plan);
  if (!plan.in_place) {
    const Activations x = make_activations(*a, plan);
    const Gather gather = make_gather(*a, plan);
    if (plan.bytes)
      quantize_rows(x, plan.x_group, gather, l.k_padded, (int8_t*)a->workspace, l.k_padded,
                    (float*)p.x_scales, stream);
    else
      gather_rows(x, gather, a->workspace, stream);
    if (qk_status s = launched(kName)) return s;
  }
  if (qk_status s = row->launch(p, plan.schedule, a->device, stream)) return s;
  if (plan.schedule.split > 1) {
    const dim3 grid((unsigned)div_up<int64_t>(l.n, 512), (unsigned)a->m);
    if (plan.bytes)
      add_splits<true><<<grid, 128, 0, stream>>>(p, plan.schedule.split, plan.shift);
    else
      add_splits<false><<<grid, 128, 0, stream>>>(p, plan.schedule.split, 0);
    if (qk_status s = launched(kName)) return s;
  }
  last_kernel = row->name;
  return QK_OK;
}

extern "C" const char* qk_cuda_last_kernel(void) { return last_kernel; }
extern "C" int32_t qk_cuda_kernel_count(void) { return kRowCount; }
extern "C" qk_status qk_cuda_kernel_at(int32_t index, qk_cuda_kernel_info* info) {
  if (!info || info->struct_size < sizeof(qk_cuda_kernel_info) || index < 0 || index >= kRowCount)
    return fail(QK_INVALID_ARGUMENT, "qk_cuda_kernel_at: index must lie within 0 and %d",
                kRowCount - 1);
  const Row& row = kRows[index];
  static const char* const kWeights[] = {"", "integers", "tables", "integers or tables"};
  info->name = row.name;
  info->weights = kWeights[row.kinds];
  info->bits = row.bits;
  info->table_per = row.table_per;
  info->activations = row.activations == QK_F16    ? "float16"
                      : row.activations == QK_BF16 ? "bfloat16"
                                                   : "int8, int8_group";
  return QK_OK;
}
