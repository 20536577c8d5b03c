// SPDX-License-Identifier: Apache-2.0
// Dynamic int8 activations, and gathering of activation columns. One block of 256 threads per row
// (and group): a pass for the largest magnitude, a pass that writes; the second finds the row in
// the cache. Magnitudes are compared as integers (bits of non-negative floats sort like the floats,
// NaN and infinity last), which is exact and independent of the order: same bits as the CPU.
//   scale = m / 127, q = rint(x * (127 / m)), half to even, divisions and products rounded singly.
// Dense 16-bit rows that start at multiples of 16 bytes are read 16 bytes at a time.
//
// Compiled and host-tested (the functions of quantize.cuh against the CPU quantizer); no GPU has
// run it.

#include "host.h"
#include "quantize.cuh"

namespace qkern {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__device__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t warps[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2)
    value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
  __syncthreads();  // the previous use of `warps` is over
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = warps[threadIdx.x % (kThreads / 32)];
  for (int offset = kThreads / 64; offset > 0; offset /= 2)
    value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

__device__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Largest magnitude of columns [begin, end) of the weight's order; perm only where there are groups.
__device__ uint32_t row_max(const Activations& x, const Gather& gather, int64_t row, int64_t begin,
                            int64_t end) {
  const int bytes = x.dtype == QK_F32 ? 4 : 2;
  const uint8_t* base = (const uint8_t*)x.data + row * x.row_stride * bytes;
  uint32_t largest = 0;
  const bool whole = begin == 0 && end == x.k;  // then the order does not matter
  if (bytes == 2 && x.col_stride == 1 && whole && (uintptr_t)base % 16 == 0) {
    const int64_t vectors = end / 8;
    for (int64_t v = threadIdx.x; v < vectors; v += kThreads) {
      const Vector eight = ((const Vector*)base)[v];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        largest = max(largest, magnitude(load_number(&eight, x.dtype, i)));
    }
    begin = vectors * 8;
  }
  for (int64_t c = begin + threadIdx.x; c < end; c += kThreads) {
    int64_t from = c;
    if (!whole && gather.perm) {
      from = gather.perm[c];
      if (from < 0 || from >= x.k) return 0x7fc00000u;
    }
    largest = max(largest, magnitude(load_number(base, x.dtype, from * x.col_stride)));
  }
  return largest;
}

__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const __grid_constant__ Activations x, int64_t group, int64_t group_out,
                    const __grid_constant__ Gather gather, int64_t columns, int8_t* q,
                    int64_t q_row_stride, float* scales) {
  const int64_t row = blockIdx.x, groups = div_up(x.k, group);
  const int64_t base = row * x.row_stride;
  for (int64_t g = blockIdx.y; g < groups; g += gridDim.y) {
    const int64_t end = min((g + 1) * group, x.k);
    const QuantizeScale s = quantize_scale(block_max(row_max(x, gather, row, g * group, end)));
    if (threadIdx.x == 0) scales[row * groups + g] = s.scale;
    const int64_t out_begin = g * group_out;
    const int64_t out_end = g + 1 < groups ? out_begin + group_out : columns;
    for (int64_t c = out_begin + threadIdx.x; c < out_end; c += kThreads) {
      const int64_t from = gather.source(c);
      q[row * q_row_stride + c] =
          from < 0 ? (int8_t)0
                   : quantized(load_number(x.data, x.dtype, base + from * x.col_stride), s);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ Activations x, const __grid_constant__ Gather gather,
                  uint16_t* out) {
  const int64_t columns = gather.layout.k_padded, row = blockIdx.x;
  const uint16_t* from = (const uint16_t*)x.data + row * x.row_stride;
  for (int64_t c = (int64_t)blockIdx.y * kThreads + threadIdx.x; c < columns;
       c += (int64_t)gridDim.y * kThreads) {
    const int64_t source = gather.source(c);
    out[row * columns + c] = source >= 0 ? from[source * x.col_stride]
                             : source == -1 ? (uint16_t)0
                                            : (uint16_t)0x7fffu;  // NaN in either type
  }
}

}  // namespace

void quantize_rows(const Activations& x, int64_t group, const Gather& gather, int64_t columns,
                   int8_t* q, int64_t q_row_stride, float* scales, cudaStream_t stream) {
  const int64_t groups = div_up(x.k, group);
  const int64_t group_out =
      groups == 1 ? columns : gather.padded && gather.layout.groups > 1 ? gather.layout.group_padded
                                                                        : group;
  const dim3 grid((unsigned)x.m, (unsigned)min64(groups, 64));
  quantize_kernel<<<grid, kThreads, 0, stream>>>(x, group, group_out, gather, columns, q,
                                                 q_row_stride, scales);
}

void gather_rows(const Activations& x, const Gather& gather, void* out, cudaStream_t stream) {
  const dim3 grid((unsigned)x.m, (unsigned)min64(div_up(gather.layout.k_padded, (int64_t)1024), 64));
  gather_kernel<<<grid, kThreads, 0, stream>>>(x, gather, (uint16_t*)out);
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
