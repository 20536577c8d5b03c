// SPDX-License-Identifier: Apache-2.0
// qk_cuda_dequantize: checks and launches of dequantize.cuh.

#include "dequantize.cuh"
#include "host.h"

namespace qkern {
namespace cuda {
namespace {

template <Order kOrder, int kBits>
void run_blocks(const Weights& w, int64_t begin, int64_t count, const Output& out,
                cudaStream_t stream) {
  const int64_t first = begin / kTileRows, last = (begin + count - 1) / kTileRows;
  const dim3 grid((unsigned)div_up<int64_t>(w.layout.k_blocks, kDequantizeWarps), 1);
  constexpr int64_t kMaxTiles = 65535;  // of grid.y
  for (int64_t tile = first; tile <= last; tile += kMaxTiles) {
    const int64_t tiles = min64(kMaxTiles, last + 1 - tile);
    const int64_t row = max64(begin, tile * kTileRows);
    const int64_t rows = min64(begin + count, (tile + tiles) * kTileRows) - row;
    Output part = out;
    part.data = (uint8_t*)out.data + (row - begin) * out.row_stride * dtype_size(out.dtype);
    const dim3 blocks(grid.x, (unsigned)tiles);
    if (out.dtype == QK_F32)
      dequantize_blocks<kOrder, kBits, 4>
          <<<blocks, kDequantizeWarps * 32, 0, stream>>>(w, row, rows, part);
    else
      dequantize_blocks<kOrder, kBits, 2>
          <<<blocks, kDequantizeWarps * 32, 0, stream>>>(w, row, rows, part);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace qkern

using namespace qkern;
using namespace qkern::cuda;

extern "C" qk_status qk_cuda_dequantize(const qk_cuda_dequantize_args* a) {
  constexpr const char* kName = "qk_cuda_dequantize";
  if (!a || a->struct_size < sizeof(qk_cuda_dequantize_args))
    return fail(QK_INVALID_ARGUMENT, "%s: struct_size must be at least %zu", kName,
                sizeof(qk_cuda_dequantize_args));
  Weights w;
  if (qk_status s = open_packed(kName, a->weight, a->packed, a->packed_bytes, &w.layout)) return s;
  w.table_scale = a->weight->table_scale;
  w.packed = (const uint8_t*)a->packed;
  const Layout& l = w.layout;
  if (!is_float_type(a->out_dtype))
    return fail(QK_INVALID_ARGUMENT, "%s: out must be float32, float16 or bfloat16", kName);
  if (a->row_count < 0 || (!a->rows && (a->row_begin < 0 || a->row_begin + a->row_count > l.n)))
    return fail(QK_INVALID_ARGUMENT, "%s: rows %lld..%lld do not lie within the %lld of the weight",
                kName, (long long)a->row_begin, (long long)(a->row_begin + a->row_count),
                (long long)l.n);
  if (a->row_count == 0) return QK_OK;
  if (!a->out || (a->row_count > 1 && a->out_row_stride < l.k))
    return fail(QK_INVALID_ARGUMENT, "%s: out must not be NULL and its rows hold %lld elements",
                kName, (long long)l.k);
  const DeviceGuard guard(a->device);
  if (guard.error()) return runtime_status(guard.error(), kName);
  const cudaStream_t stream = (cudaStream_t)a->stream;
  const Output out = {a->out, a->out_dtype, a->out_row_stride};
  const bool same_columns = !l.perm && (l.groups == 1 || l.group_padded == l.group);
  if (a->rows || !same_columns) {
    const int64_t blocks = div_up<int64_t>(a->row_count * l.k, 256);
    dequantize_elements<<<(unsigned)min64(blocks, 65536), 256, 0, stream>>>(
        w, a->rows, a->row_begin, a->row_count, out);
    return launched(kName);
  }
  with_codes(l, [&](auto codes) {
    run_blocks<codes.kOrder, codes.kBits>(w, a->row_begin, a->row_count, out, stream);
  });
  return launched(kName);
}
