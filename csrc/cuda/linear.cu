// SPDX-License-Identifier: Apache-2.0
// qk_cuda_linear and qk_cuda_grouped_linear: checks, choice of the kernel, preparation of
// activations, launch, sum of splits.
//
// Launches, all on the caller's stream, from sizes and addresses alone:
//   0. mixture of experts: the list of token tiles, out of the offsets on the device
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

// A call, with or without experts.
struct Call {
  const char* name;
  const qk_cuda_linear_args& a;
  Experts experts;
  Layout layout;
  Plan plan;

  qk_status check() {
    if (a.struct_size < sizeof a)
      return fail(QK_INVALID_ARGUMENT, "%s: struct_size must be at least %zu", name, sizeof a);
    if (qk_status s = open_packed(name, a.weight, a.packed, a.packed_bytes, &layout)) return s;
    if (experts.count && a.packed_bytes / experts.count < layout.total_bytes)
      return fail(QK_INVALID_ARGUMENT,
                  "%s: the packed weights of %lld experts need %lld bytes each, got %lld in all",
                  name, (long long)experts.count, (long long)layout.total_bytes,
                  (long long)a.packed_bytes);
    if (!is_float_type(a.x_dtype) || !is_float_type(a.y_dtype) ||
        (a.bias && !is_float_type(a.bias_dtype)))
      return fail(QK_INVALID_ARGUMENT, "%s: x, bias and y must be float32, float16 or bfloat16",
                  name);
    if (a.m < 0 || a.m >= (int64_t)1 << 31)
      return fail(QK_INVALID_ARGUMENT, "%s: m must lie within 0 and 2^31, got %lld", name,
                  (long long)a.m);
    return QK_OK;
  }

  qk_status make() {
    int sms = 0;
    if (qk_status s = runtime_status(
            cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, a.device), name))
      return s;
    const char* const reason = make_plan(a, experts, layout, sms, &plan);
    return reason ? fail(QK_UNSUPPORTED, "%s: %s", name, reason) : QK_OK;
  }

  qk_status workspace(int64_t* bytes) {
    if (qk_status s = check()) return s;
    if (!bytes) return fail(QK_INVALID_ARGUMENT, "%s: bytes must not be NULL", name);
    *bytes = 0;
    if (a.m == 0) return QK_OK;
    if (qk_status s = make()) return s;
    *bytes = plan.workspace();
    return QK_OK;
  }

  qk_status run() {
    if (qk_status s = check()) return s;
    qk_status status = QK_OK;
    const Row* const row = select(layout, a.x_dtype, &status);
    if (!row) return status;
    if (a.m == 0) return QK_OK;
    if (!a.x || !a.y) return fail(QK_INVALID_ARGUMENT, "%s: x and y must not be NULL", name);
    if (a.m > 1 && a.y_row_stride < layout.n)
      return fail(QK_INVALID_ARGUMENT, "%s: rows of y need %lld elements, their stride is %lld",
                  name, (long long)layout.n, (long long)a.y_row_stride);
    const DeviceGuard guard(a.device);
    if (guard.error()) return runtime_status(guard.error(), name);
    if (qk_status s = make()) return s;
    if (plan.workspace() > 0 &&
        (a.workspace_bytes < plan.workspace() || !a.workspace || (uintptr_t)a.workspace % 128))
      return fail(QK_INVALID_ARGUMENT,
                  "%s: needs a workspace of %lld bytes aligned to 128, got %lld at %p", name,
                  (long long)plan.workspace(), (long long)a.workspace_bytes, a.workspace);
    return launch_all(*row, (cudaStream_t)a.stream);
  }

  qk_status launch_all(const Row& row, cudaStream_t stream) {
    const LinearParams p = make_params(a, experts, plan);
    const Schedule& s = plan.schedule;
    const int tokens = shape_of(s.shape, plan.bytes).tokens();
    if (experts.count) {
      list_tiles(experts.offsets, experts.count, a.m, tokens, s.token_tiles, (ExpertTile*)p.tiles,
                 stream);
      if (qk_status status = launched(name)) return status;
    }
    if (!plan.in_place) {
      const Activations x = make_activations(a, plan);
      const Gather gather = make_gather(a, experts, plan);
      if (plan.bytes)
        quantize_rows(x, plan.x_group, gather, layout.k_padded, (int8_t*)a.workspace,
                      layout.k_padded, (float*)p.x_scales, stream);
      else
        gather_rows(x, gather, a.workspace, stream);
      if (qk_status status = launched(name)) return status;
    }
    if (qk_status status = row.launch(p, s, a.device, stream)) return status;
    if (s.split > 1) {
      const dim3 grid((unsigned)(s.token_tiles * tokens),
                      (unsigned)div_up<int64_t>(layout.n, kAddRows));
      if (plan.bytes)
        add_splits<true><<<grid, kAddThreads, 0, stream>>>(p, tokens, s.split, plan.shift);
      else
        add_splits<false><<<grid, kAddThreads, 0, stream>>>(p, tokens, s.split, 0);
      if (qk_status status = launched(name)) return status;
    }
    last_kernel = row.name;
    return QK_OK;
  }
};

static qk_status grouped_call(const char* name, const qk_cuda_grouped_linear_args* g,
                              qk_status (*use)(Call*, int64_t*), int64_t* bytes) {
  if (!g || g->struct_size < sizeof *g)
    return fail(QK_INVALID_ARGUMENT, "%s: struct_size must be at least %zu", name, sizeof *g);
  if (g->experts < 1 || !g->offsets)
    return fail(QK_INVALID_ARGUMENT,
                "%s: at least one expert and the offsets of their rows must be given, got %lld "
                "experts",
                name, (long long)g->experts);
  Call call = {name, g->linear, {g->experts, g->offsets, g->table_scales}, {}, {}};
  return use(&call, bytes);
}

static qk_status plain_call(const char* name, const qk_cuda_linear_args* a,
                            qk_status (*use)(Call*, int64_t*), int64_t* bytes) {
  if (!a) return fail(QK_INVALID_ARGUMENT, "%s: the arguments must not be NULL", name);
  Call call = {name, *a, {}, {}, {}};
  return use(&call, bytes);
}

static qk_status ask_workspace(Call* call, int64_t* bytes) { return call->workspace(bytes); }
static qk_status run_call(Call* call, int64_t*) { return call->run(); }

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
  return plain_call("qk_cuda_linear_workspace", a, ask_workspace, bytes);
}
extern "C" qk_status qk_cuda_linear(const qk_cuda_linear_args* a) {
  return plain_call("qk_cuda_linear", a, run_call, nullptr);
}
extern "C" qk_status qk_cuda_grouped_linear_workspace(const qk_cuda_grouped_linear_args* g,
                                                      int64_t* bytes) {
  return grouped_call("qk_cuda_grouped_linear_workspace", g, ask_workspace, bytes);
}
extern "C" qk_status qk_cuda_grouped_linear(const qk_cuda_grouped_linear_args* g) {
  return grouped_call("qk_cuda_grouped_linear", g, run_call, nullptr);
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
