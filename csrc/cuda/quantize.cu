// SPDX-License-Identifier: Apache-2.0
// qk_cuda_quantize_activations, and the launches of quantize.cuh and list_tiles.cuh.

#include "host.h"
#include "list_tiles.cuh"
#include "prepare.h"
#include "quantize.cuh"

namespace qkern {
namespace cuda {

void quantize_rows(const Activations& x, int64_t group, const Gather& gather, int64_t columns,
                   int8_t* q, int64_t q_row_stride, float* scales, cudaStream_t stream) {
  const int64_t groups = div_up(x.k, group);
  const dim3 grid((unsigned)x.m, (unsigned)min64(groups, 64));
  quantize_kernel<<<grid, kQuantizeThreads, 0, stream>>>(
      x, group, group_out(group, gather, columns, x.k), gather, columns, q, q_row_stride, scales);
}

void gather_rows(const Activations& x, const Gather& gather, void* out, cudaStream_t stream) {
  const dim3 grid((unsigned)x.m,
                  (unsigned)min64(div_up(gather.layout.k_padded, (int64_t)1024), 64));
  gather_kernel<<<grid, kQuantizeThreads, 0, stream>>>(x, gather, (uint16_t*)out);
}

void list_tiles(const int64_t* offsets, int64_t experts, int64_t m, int tokens, int64_t count,
                ExpertTile* tiles, cudaStream_t stream) {
  list_tiles_kernel<<<1, kListThreads, 0, stream>>>(offsets, experts, m, tokens, count, tiles);
}

}  // namespace cuda
}  // namespace qkern

using namespace qkern;
using namespace qkern::cuda;

extern "C" qk_status qk_cuda_quantize_activations(const qk_cuda_quantize_args* a) {
  constexpr const char* kName = "qk_cuda_quantize_activations";
  if (!a || a->struct_size < sizeof(qk_cuda_quantize_args))
    return fail(QK_INVALID_ARGUMENT, "%s: struct_size must be at least %zu", kName,
                sizeof(qk_cuda_quantize_args));
  if (!is_float_type(a->x_dtype))
    return fail(QK_INVALID_ARGUMENT, "%s: x must be float32, float16 or bfloat16", kName);
  if (a->m < 0 || a->k < 0 || a->group < 0 || a->m >= (int64_t)1 << 31)
    return fail(QK_INVALID_ARGUMENT,
                "%s: m, k and group must not be negative and m below 2^31, got %lld, %lld, %lld",
                kName, (long long)a->m, (long long)a->k, (long long)a->group);
  if (a->m == 0 || a->k == 0) return QK_OK;
  if (!a->x || !a->q || !a->scales || (a->m > 1 && a->q_row_stride < a->k))
    return fail(QK_INVALID_ARGUMENT,
                "%s: x, q and scales must not be NULL and rows of q hold %lld elements", kName,
                (long long)a->k);
  const DeviceGuard guard(a->device);
  if (guard.error()) return runtime_status(guard.error(), kName);
  const Activations x = {a->x, a->x_dtype, a->m, a->k, a->x_row_stride, a->x_col_stride};
  const int64_t group = a->group > 0 && a->group < a->k ? a->group : a->k;
  quantize_rows(x, group, Gather{}, a->k, a->q, a->q_row_stride, a->scales,
                (cudaStream_t)a->stream);
  return launched(kName);
}
