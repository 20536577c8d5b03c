// SPDX-License-Identifier: Apache-2.0
// qk_cuda_linear_grad_input: checks, preparation of dy, launch of gradient.cuh.

#include "gradient.cuh"
#include "host.h"
#include "prepare.h"

namespace qkern {
namespace cuda {
namespace {

// dy is read in place where 16-byte pieces of its rows are aligned, else out of the workspace.
struct GradPlan {
  bool in_place;
  int64_t columns, workspace;
};

GradPlan make_plan(const qk_cuda_grad_args& a, const Layout& l) {
  GradPlan plan = {};
  plan.in_place = a.dy_col_stride == 1 && l.n % 8 == 0 && (a.m == 1 || a.dy_row_stride % 8 == 0) &&
                  (uintptr_t)a.dy % 16 == 0;
  plan.columns = l.row_tiles * kTileRows;
  plan.workspace = plan.in_place ? 0 : a.m * plan.columns * 2;
  return plan;
}

qk_status check(const qk_cuda_grad_args* a, Layout* layout) {
  constexpr const char* kName = "qk_cuda_linear_grad_input";
  if (!a || a->struct_size < sizeof(qk_cuda_grad_args))
    return fail(QK_INVALID_ARGUMENT, "%s: struct_size must be at least %zu", kName,
                sizeof(qk_cuda_grad_args));
  if (qk_status s = open_packed(kName, a->weight, a->packed, a->packed_bytes, layout)) return s;
  if (a->dtype != QK_F16 && a->dtype != QK_BF16)
    return fail(QK_UNSUPPORTED,
                "%s: dy and dx must be float16 or bfloat16; cast dy, or multiply "
                "with the dequantized weight",
                kName);
  if (a->m < 0 || a->m >= (int64_t)65535 * kGradTokens)
    return fail(QK_INVALID_ARGUMENT, "%s: m must lie within 0 and %lld, got %lld", kName,
                (long long)65535 * kGradTokens, (long long)a->m);
  return QK_OK;
}

template <class T, class Codes>
qk_status launch(const GradParams& p, int32_t device, cudaStream_t stream) {
  constexpr auto kKernel = gradient_kernel<T, Codes::kOrder, Codes::kBits>;
  constexpr int kBytes = GradTile<Codes::kBits>::kSharedBytes;
  static SharedGrant granted;
  if (qk_status s = granted.request((const void*)kKernel, device, "qk_cuda_linear_grad_input"))
    return s;
  const dim3 grid((unsigned)p.w.layout.k_blocks, (unsigned)div_up<int64_t>(p.m, kGradTokens));
  kKernel<<<grid, kGradThreads, kBytes, stream>>>(p);
  return launched("qk_cuda_linear_grad_input");
}

}  // namespace
}  // namespace cuda
}  // namespace qkern

using namespace qkern;
using namespace qkern::cuda;

extern "C" qk_status qk_cuda_linear_grad_workspace(const qk_cuda_grad_args* a, int64_t* bytes) {
  Layout l;
  if (qk_status s = check(a, &l)) return s;
  if (!bytes)
    return fail(QK_INVALID_ARGUMENT, "qk_cuda_linear_grad_workspace: bytes must not be NULL");
  *bytes = make_plan(*a, l).workspace;
  return QK_OK;
}

extern "C" qk_status qk_cuda_linear_grad_input(const qk_cuda_grad_args* a) {
  constexpr const char* kName = "qk_cuda_linear_grad_input";
  Layout l;
  if (qk_status s = check(a, &l)) return s;
  if (a->m == 0) return QK_OK;
  if (!a->dy || !a->dx || (a->m > 1 && a->dx_row_stride < l.k))
    return fail(QK_INVALID_ARGUMENT,
                "%s: dy and dx must not be NULL and rows of dx hold %lld "
                "elements",
                kName, (long long)l.k);
  const GradPlan plan = make_plan(*a, l);
  if (plan.workspace > 0 &&
      (a->workspace_bytes < plan.workspace || !a->workspace || (uintptr_t)a->workspace % 128))
    return fail(QK_INVALID_ARGUMENT,
                "%s: needs a workspace of %lld bytes aligned to 128, got %lld at %p", kName,
                (long long)plan.workspace, (long long)a->workspace_bytes, a->workspace);
  const DeviceGuard guard(a->device);
  if (guard.error()) return runtime_status(guard.error(), kName);
  const cudaStream_t stream = (cudaStream_t)a->stream;
  GradParams p = {};
  p.w = {l, a->weight->table_scale, (const uint8_t*)a->packed};
  p.dy = plan.in_place ? a->dy : a->workspace;
  // A single row has no stride of its own; rows behind it are copied with no bytes, yet aligned.
  p.dy_stride = !plan.in_place ? plan.columns : a->m == 1 ? 0 : a->dy_row_stride;
  p.dy_columns = plan.in_place ? l.n : plan.columns;
  p.m = a->m;
  p.dx = a->dx;
  p.dx_stride = a->dx_row_stride;
  if (!plan.in_place) {
    const Activations dy = {a->dy, a->dtype, a->m, l.n, a->dy_row_stride, a->dy_col_stride};
    gather_rows(dy, padded_rows(l.n, plan.columns), a->workspace, stream);
    if (qk_status s = launched(kName)) return s;
  }
  qk_status status = QK_OK;
  with_codes(l, [&](auto codes) {
    status = a->dtype == QK_F16 ? launch<F16, decltype(codes)>(p, a->device, stream)
                                : launch<BF16, decltype(codes)>(p, a->device, stream);
  });
  return status;
}
