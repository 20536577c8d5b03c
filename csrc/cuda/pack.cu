// SPDX-License-Identifier: Apache-2.0
// qk_cuda_pack and qk_cuda_unpack: between canonical storage and the layout of layout.cuh.
// Not hot: a weight is packed once. One thread per element of the destination, any shape.
//
// Compiled and host-tested (the functions of pack.cuh); no GPU has run it.

#include "host.h"
#include "pack.cuh"

namespace qkern {
namespace cuda {
namespace {

constexpr int kThreads = 256;

QK_HD unsigned blocks_for(int64_t elements) {
  const int64_t blocks = div_up<int64_t>(elements, kThreads);
  return (unsigned)(blocks < 65536 ? blocks : 65536);
}

template <class F>
__device__ void for_each(int64_t count, F&& f) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) f(i);
}

__global__ void pack_codes(Layout l, const uint8_t* codes, int64_t stride, uint32_t* packed) {
  for_each(l.row_tiles * l.k_blocks * l.block_bytes / 4,
           [&](int64_t i) { packed[i] = pack_codes_word(l, codes, stride, i); });
}

__global__ void unpack_codes(Layout l, const uint8_t* packed, uint8_t* codes) {
  const int64_t row_bytes = div_up<int64_t>(l.k * l.bits, 8);
  for_each(l.n * row_bytes, [&](int64_t i) {
    codes[i] = unpack_codes_byte(l, packed, i / row_bytes, i % row_bytes);
  });
}

__global__ void pack_numbers(Layout l, const void* from, qk_dtype from_dtype, int64_t stride,
                             void* to, qk_dtype to_dtype) {
  for_each(l.row_tiles * kTileRows * l.groups, [&](int64_t i) {
    const int64_t row = i / l.groups, g = i % l.groups, at = l.scale_index(row, g);
    if (row < l.n)
      convert_number(from, from_dtype, row * stride + g, to, to_dtype, at);
    else
      store_number(to, to_dtype, at, 0.f);
  });
}

__global__ void unpack_numbers(Layout l, const void* from, qk_dtype from_dtype, void* to,
                               qk_dtype to_dtype) {
  for_each(l.n * l.groups, [&](int64_t i) {
    convert_number(from, from_dtype, l.scale_index(i / l.groups, i % l.groups), to, to_dtype, i);
  });
}

__global__ void pack_block_tables(Layout l, uint8_t* packed) {
  for_each(block_table_count(l), [&](int64_t i) { pack_block_table(l, i, packed); });
}

qk_status copy(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  return runtime_status(cudaMemcpyAsync(to, from, (size_t)bytes, cudaMemcpyDeviceToDevice, stream),
                        "qk_cuda copy");
}

}  // namespace
}  // namespace cuda
}  // namespace qkern

using namespace qkern;
using namespace qkern::cuda;

extern "C" qk_status qk_cuda_packed_bytes(const qk_weight* weight, int64_t* bytes) {
  if (!weight || weight->struct_size < sizeof(qk_weight) || !bytes)
    return fail(QK_INVALID_ARGUMENT,
                "qk_cuda_packed_bytes: weight and bytes must be given, struct_size at least %zu",
                sizeof(qk_weight));
  Layout l;
  if (const char* reason = make_layout(*weight, &l))
    return fail(QK_UNSUPPORTED, "qk_cuda_packed_bytes: %s", reason);
  *bytes = l.total_bytes;
  return QK_OK;
}

extern "C" qk_status qk_cuda_pack(const qk_weight* w, void* packed, int64_t bytes, int32_t device,
                                  void* stream_) {
  Layout l;
  if (qk_status status = open_packed("qk_cuda_pack", w, packed, bytes, &l)) return status;
  if (!w->codes) return fail(QK_INVALID_ARGUMENT, "qk_cuda_pack: codes must not be NULL");
  const DeviceGuard guard(device);
  if (guard.error()) return runtime_status(guard.error(), "qk_cuda_pack");
  const cudaStream_t stream = (cudaStream_t)stream_;
  uint8_t* base = (uint8_t*)packed;
  pack_codes<<<blocks_for(l.row_tiles * l.k_blocks * l.block_bytes / 4), kThreads, 0, stream>>>(
      l, w->codes, w->codes_stride_bytes, (uint32_t*)(base + l.codes_offset));
  const int64_t cells = l.row_tiles * kTileRows * l.groups;
  if (w->scales)
    pack_numbers<<<blocks_for(cells), kThreads, 0, stream>>>(
        l, w->scales, l.scale_dtype, w->scales_stride, base + l.scales_offset, l.scale_stored);
  if (w->zeros)
    pack_numbers<<<blocks_for(cells), kThreads, 0, stream>>>(
        l, w->zeros, l.zero_dtype, w->zeros_stride, base + l.zeros_offset, l.zero_stored);
  if (qk_status status = launched("qk_cuda_pack")) return status;
  if (l.kind == QK_KIND_TABLE)
    if (qk_status status = copy(base + l.table_offset, w->codebook, l.table_entries() * 4, stream))
      return status;
  if (const int64_t tables = block_table_count(l)) {
    pack_block_tables<<<blocks_for(tables), kThreads, 0, stream>>>(l, base);
    if (qk_status status = launched("qk_cuda_pack")) return status;
  }
  return w->perm ? copy(base + l.perm_offset, w->perm, l.k * 4, stream) : QK_OK;
}

extern "C" qk_status qk_cuda_unpack(const qk_weight* w, const void* packed, int64_t bytes,
                                    const qk_weight_out* out, int32_t device, void* stream_) {
  Layout l;
  if (qk_status status = open_packed("qk_cuda_unpack", w, packed, bytes, &l)) return status;
  if (!out || out->struct_size < sizeof(qk_weight_out))
    return fail(QK_INVALID_ARGUMENT, "qk_cuda_unpack: qk_weight_out.struct_size must be %zu",
                sizeof(qk_weight_out));
  if ((out->scales && !w->scales) || (out->zeros && !w->zeros) || (out->perm && !w->perm) ||
      (out->codebook && l.kind != QK_KIND_TABLE))
    return fail(QK_INVALID_ARGUMENT, "qk_cuda_unpack: a part was asked for that this weight lacks");
  const DeviceGuard guard(device);
  if (guard.error()) return runtime_status(guard.error(), "qk_cuda_unpack");
  const cudaStream_t stream = (cudaStream_t)stream_;
  const uint8_t* base = (const uint8_t*)packed;
  if (out->codes)
    unpack_codes<<<blocks_for(l.n * div_up<int64_t>(l.k * l.bits, 8)), kThreads, 0, stream>>>(
        l, base, out->codes);
  if (out->scales)
    unpack_numbers<<<blocks_for(l.n * l.groups), kThreads, 0, stream>>>(
        l, base + l.scales_offset, l.scale_stored, out->scales, l.scale_dtype);
  if (out->zeros)
    unpack_numbers<<<blocks_for(l.n * l.groups), kThreads, 0, stream>>>(
        l, base + l.zeros_offset, l.zero_stored, out->zeros, l.zero_dtype);
  if (qk_status status = launched("qk_cuda_unpack")) return status;
  if (out->codebook)
    if (qk_status status =
            copy(out->codebook, base + l.table_offset, l.table_entries() * 4, stream))
      return status;
  return out->perm ? copy(out->perm, base + l.perm_offset, l.k * 4, stream) : QK_OK;
}
