// SPDX-License-Identifier: Apache-2.0
// Dequantize, embedding and the activation quantizer on the emulated device: the CPU's bits.
#include <math.h>

#include <vector>

#include "../quantize.cuh"
#include "device.h"
#include "weights.h"

using namespace qkern;
using namespace qkern::cuda;

namespace {

template <Order kOrder, int kBits>
void run_blocks(const Weights& w, int64_t begin, int64_t count, const Output& out) {
  const emulator::Dim grid = {(unsigned)div_up<int64_t>(w.layout.k_blocks, kDequantizeWarps),
                              (unsigned)((begin + count - 1) / kTileRows - begin / kTileRows + 1),
                              1};
  emulator::launch(grid, kDequantizeWarps * 32, 0, [&] {
    out.dtype == QK_F32 ? dequantize_blocks<kOrder, kBits, 4>(w, begin, count, out)
                        : dequantize_blocks<kOrder, kBits, 2>(w, begin, count, out);
  });
}

void check_dequantize(const Case& c, int dtype, uint64_t seed) {
  const HostWeight h = make_weight(c, seed);
  const Layout& l = h.layout;
  const Weights w = {l, h.w.table_scale, h.packed.data};
  const int64_t stride = l.k + 3, begin = c.n / 3, count = c.n - begin;
  const bool same = !l.perm && (l.groups == 1 || l.group_padded == l.group);
  const auto verify = [&](const Buffer<uint8_t>& got, int64_t i, int64_t row) {
    for (int64_t column = 0; column < l.k; ++column) {
      uint8_t expected[4];
      store_float(expected, dtype, 0, row < 0 || row >= l.n ? NAN : contract(h, row, column));
      const int64_t to = h.w.perm ? h.perm[column] : column;
      const float a = load_float(expected, dtype, 0),
                  b = load_float(got.data, dtype, i * stride + to);
      CHECK(a != a ? b != b : float_bits(a) == float_bits(b), "row %lld column %lld: %g for %g",
            (long long)row, (long long)column, b, a);
    }
  };
  const int64_t bytes = ((count - 1) * stride + l.k) * dtype_size(dtype);
  if (same) {
    Buffer<uint8_t> out(bytes);
    const Output o = {out.data, dtype, stride};
    with_codes(l, [&](auto codes) { run_blocks<codes.kOrder, codes.kBits>(w, begin, count, o); });
    for (int64_t i = 0; i < count; ++i) verify(out, i, begin + i);
  }
  Buffer<uint8_t> out(bytes);
  Buffer<int64_t> rows(count);
  for (int64_t i = 0; i < count; ++i) rows[i] = i == 1 ? -1 : i == 2 ? l.n : (i * 7) % l.n;
  emulator::launch({3, 1, 1}, 64, 0,
                   [&] { dequantize_elements(w, rows.data, 0, count, {out.data, dtype, stride}); });
  for (int64_t i = 0; i < count; ++i) verify(out, i, rows[i]);
}

void check_quantizer(int dtype, int64_t k, int64_t group, uint64_t seed) {
  Random random(seed);
  const int64_t m = 6, stride = k + (seed % 2 ? 1 : 8 - k % 8);
  Buffer<uint8_t> x(((m - 1) * stride + k) * dtype_size(dtype));
  for (int64_t r = 0; r < m; ++r)
    for (int64_t c = 0; c < k; ++c) {
      float value = random.uniform() * ldexpf(1.f, random.below(8));
      if (r == 1) value = 0;
      if (r == 2 && dtype != QK_F16) value *= 0x1p-110f;
      if (r == 3 && c == k / 2) value = NAN;
      if (r == 4 && c == 0) value = -INFINITY;
      if (r == 5) value = (float)(random.below(255) - 127) * 0.5f;  // ties
      store_float(x.data, dtype, r * stride + c, value);
    }
  const int64_t g = group ? group : k, groups = (k + g - 1) / g;
  Buffer<int8_t> q(m * k);
  Buffer<float> scales(m * groups);
  const Activations a = {x.data, dtype, m, k, stride, 1};
  const Gather plain = {};
  emulator::launch({(unsigned)m, (unsigned)groups, 1}, kQuantizeThreads, 0, [&] {
    quantize_kernel(a, g, group_out(g, plain, k, k), plain, k, q.data, k, scales.data);
  });
  for (int64_t r = 0; r < m; ++r)
    for (int64_t i = 0; i < groups; ++i) {
      float largest = 0;
      bool finite = true;
      const int64_t end = i * g + g < k ? i * g + g : k;
      for (int64_t c = i * g; c < end; ++c) {
        const float v = fabsf(load_float(x.data, dtype, r * stride + c));
        finite = finite && v < INFINITY;
        if (v > largest) largest = v;
      }
      const bool usable = finite && largest >= 0x1p-100f;
      const float scale = scales[r * groups + i];
      CHECK(!finite ? scale != scale : scale == (usable ? largest / 127.f : 0.f),
            "dtype %d k %lld group %lld row %lld: %g, largest %g", dtype, (long long)k,
            (long long)group, (long long)r, scale, largest);
      const float factor = usable ? 127.f / largest : 0.f;
      for (int64_t c = i * g; c < end; ++c) {
        const float v = load_float(x.data, dtype, r * stride + c);
        CHECK(q[r * k + c] == (usable ? (int)rintf(v * factor) : 0), "row %lld column %lld",
              (long long)r, (long long)c);
      }
    }
}

}  // namespace

void check_other_kernels() {
  uint64_t seed = 1;
  for (const int dtype : {QK_F32, QK_F16, QK_BF16}) {
    for (const int bits : {2, 3, 4, 8}) {
      check_dequantize(
          {QK_KIND_INT, bits, QK_ACT_FLOAT, 70, 200, 32, 0, QK_F16, QK_U8, false, false}, dtype,
          seed++);
      check_dequantize({QK_KIND_INT, bits, QK_ACT_FLOAT, 66, 129, 24, 0, QK_F32, -1, true, false},
                       dtype, seed++);
      check_dequantize({QK_KIND_TABLE, bits, QK_ACT_FLOAT, 70, 136, 64, QK_TABLE_PER_TENSOR, QK_F16,
                        -1, false, false},
                       dtype, seed++);
      check_dequantize({QK_KIND_TABLE, bits, QK_ACT_FLOAT, 70, 136, 48, QK_TABLE_PER_GROUP, -1, -1,
                        false, false},
                       dtype, seed++);
    }
    check_dequantize(
        {QK_KIND_TABLE, 3, QK_ACT_FLOAT, 70, 200, 64, QK_TABLE_PER_TILE, -1, -1, false, false},
        dtype, seed++);
    for (const int bits : {2, 3, 4, 8}) {
      check_dequantize({QK_KIND_INT, bits, QK_ACT_INT8, 70, 200, 0, 0, QK_F32, -1, false, false},
                       dtype, seed++);
      check_dequantize({QK_KIND_TABLE, bits, QK_ACT_INT8, 70, 200, 0, QK_TABLE_PER_ROW, QK_F32, -1,
                        false, false},
                       dtype, seed++);
    }
    for (const int64_t k : {1, 8, 100, 1000})
      for (const int64_t group : {0, 32, 100}) check_quantizer(dtype, k, group, seed++);
  }
}
