// SPDX-License-Identifier: Apache-2.0
// The gradient kernel's own source on the emulated device, for every layout of codes, with tails,
// padded groups, permutations and unaligned rows of dy.
//
// Oracle: the weight of qk_cuda_dequantize, rounded once, times dy in float64. Exact where every
// sum is exact in float32; else at most (rows) float32 additions of 2^-24 of the sum of magnitudes,
// and half an ulp of the result.
#include "../gradient.cuh"

#include <math.h>

#include <vector>

#include "../quantize.cuh"
#include "device.h"
#include "weights.h"

using namespace qkern;
using namespace qkern::cuda;

namespace {

struct Result {
  Buffer<uint8_t> dx;
  int64_t stride;
};

template <class T>
Result run(const HostWeight& h, const Buffer<uint8_t>& dy, int64_t dy_stride, int64_t first,
           int64_t m, bool in_place) {
  const Layout& l = h.layout;
  const Activations given = {dy.data + first * dy_stride * 2, T::kDtype, m, l.n, dy_stride, 1};
  const int64_t columns = l.row_tiles * kTileRows;
  Buffer<uint8_t> workspace(in_place ? 0 : m * columns * 2);
  if (!in_place) {
    const Gather gather = padded_rows(l.n, columns);
    emulator::launch({(unsigned)m, 1, 1}, kQuantizeThreads, 0,
                     [&] { gather_kernel(given, gather, (uint16_t*)workspace.data); });
  }
  Result r = {Buffer<uint8_t>(m * (l.k + 3) * 2), l.k + 3};
  GradParams p = {};
  p.w = {l, h.w.table_scale, h.packed.data};
  p.dy = in_place ? given.data : workspace.data;
  p.dy_stride = in_place ? dy_stride : columns;
  p.dy_columns = in_place ? l.n : columns;
  p.m = m;
  p.dx = r.dx.data;
  p.dx_stride = r.stride;
  const emulator::Dim grid = {(unsigned)l.k_blocks, (unsigned)div_up<int64_t>(m, kGradTokens), 1};
  with_codes(l, [&](auto codes) {
    constexpr int kBits = decltype(codes)::kBits;
    emulator::launch(grid, kGradThreads, GradTile<kBits>::kSharedBytes,
                     [&] { gradient_kernel<T, decltype(codes)::kOrder, kBits>(p); });
  });
  return r;
}

template <class T>
void check(const Case& c, int64_t m, bool in_place, uint64_t seed) {
  const HostWeight h = make_weight(c, seed);
  const Layout& l = h.layout;
  in_place = in_place && l.n % 8 == 0;
  Random random(seed + 1);
  const int64_t stride = in_place ? (l.n + 7) / 8 * 8 + 8 : l.n + 1;
  Buffer<uint8_t> dy(((m - 1) * stride + l.n) * 2);
  for (int64_t r = 0; r < m; ++r)
    for (int64_t n = 0; n < l.n; ++n)
      store_float(dy.data, T::kDtype, r * stride + n,
                  c.exact ? (float)(random.below(9) - 4) : random.uniform());
  const Result got = run<T>(h, dy, stride, 0, m, in_place);
  std::vector<double> w((size_t)(l.n * l.k));
  for (int64_t n = 0; n < l.n; ++n)
    for (int64_t k = 0; k < l.k; ++k)
      w[(size_t)(n * l.k + k)] = T::to_float(T::from_float(contract(h, n, k)));
  int64_t nonzero = 0;
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t k = 0; k < l.k; ++k) {
      double sum = 0, size = 0;
      for (int64_t n = 0; n < l.n; ++n) {
        const double term =
            load_float(dy.data, T::kDtype, r * stride + n) * w[(size_t)(n * l.k + k)];
        sum += term;
        size += fabs(term);
      }
      const int64_t column = h.w.perm ? h.perm[k] : k;
      const float value = load_float(got.dx.data, T::kDtype, r * got.stride + column);
      nonzero += value != 0;
      const double bound = (c.exact ? 0 : size * (double)(l.n + 8) * 0x1p-24) +
                           fabs(sum) * (T::kDtype == QK_F16 ? 0x1p-11 : 0x1p-8) * 1.001 + 0x1p-25;
      CHECK(fabs(value - sum) <= bound, "bits %d m %lld n %lld k %lld row %lld column %lld: %g, %g",
            l.bits, (long long)m, (long long)l.n, (long long)l.k, (long long)r, (long long)k, value,
            sum);
    }
    for (int64_t b = 2 * l.k; b < 2 * got.stride; ++b)
      CHECK(got.dx[r * got.stride * 2 + b] == 0xff, "written beside dx");
  }
  CHECK(nonzero > m * l.k / 8, "results are not all zero");
  // The last row alone has the bits that it has in the batch.
  const Result alone = run<T>(h, dy, stride, m - 1, 1, in_place);
  CHECK(memcmp(alone.dx.data, got.dx.data + (m - 1) * got.stride * 2, (size_t)l.k * 2) == 0,
        "a row depends on its batch");
}

// Lanes that a store of weights sends to one bank of shared memory, and a row of ldmatrix too.
void check_banks() {
  for (const Order order : {Order::kSplit, Order::kAdjacent, Order::kByte, Order::kLookup})
    for (int index = 0; index < 128; index += 2) {
      const Slot slot = {index >> 5, index >> 4 & 1, index >> 2 & 3, index & 3};
      int lanes[32] = {};
      for (int lane = 0; lane < 32; ++lane) {
        const int byte =
            block_row(slot, lane) * GradTile<4>::kWeightRow + block_column(order, slot, lane) * 2;
        CHECK(byte % 4 == 0, "slot %d", index);
        ++lanes[byte / 4 % 32];
      }
      for (const int count : lanes)
        CHECK(count <= (byte_columns(order) ? 2 : 1), "order %d slot %d", (int)order, index);
    }
  int rows[32] = {};  // eight rows of 16 bytes of a matrix
  for (int row = 0; row < 8; ++row)
    for (int word = 0; word < 4; ++word) ++rows[(row * GradTile<4>::kWeightRow / 4 + word) % 32];
  for (const int count : rows) CHECK(count == 1, "ldmatrix of weights");
}

}  // namespace

void check_gradient() {
  check_banks();
  uint64_t seed = 1;
  for (const bool exact : {true, false}) {
    const auto both = [&](Case c, int64_t m) {
      c.exact = exact;
      check<F16>(c, m, seed % 2 == 0, seed);
      ++seed;
      check<BF16>(c, m, seed % 3 == 0, seed);
      ++seed;
    };
    both({QK_KIND_INT, 4, QK_ACT_FLOAT, 130, 200, 64, 0, QK_F16, -1}, 19);
    both({QK_KIND_INT, 4, QK_ACT_FLOAT, 70, 129, 24, 0, QK_F32, QK_U8, true}, 33);
    both({QK_KIND_INT, 8, QK_ACT_FLOAT, 200, 136, 0, 0, QK_F16, -1}, 130);
    both({QK_KIND_INT, 3, QK_ACT_FLOAT, 70, 136, 32, 0, QK_F16, QK_F16}, 5);
    both({QK_KIND_INT, 2, QK_ACT_FLOAT, 64, 64, 16, 0, QK_BF16, -1}, 64);
    both({QK_KIND_TABLE, 4, QK_ACT_FLOAT, 70, 136, 16, QK_TABLE_PER_TENSOR, QK_E4M3}, 3);
    both({QK_KIND_TABLE, 3, QK_ACT_FLOAT, 70, 136, 64, QK_TABLE_PER_TILE, -1}, 9);
    both({QK_KIND_TABLE, 2, QK_ACT_FLOAT, 70, 136, 48, QK_TABLE_PER_GROUP, -1}, 9);
    for (const int bits : {2, 3, 4})
      both({QK_KIND_TABLE, bits, QK_ACT_INT8, 70, 100, 0, QK_TABLE_PER_ROW, QK_F32}, 9);
    both({QK_KIND_INT, 4, QK_ACT_INT8_GROUP, 70, 100, 40, 0, QK_F16, -1, true}, 9);
    both({QK_KIND_INT, 8, QK_ACT_INT8, 65, 100, 0, 0, QK_F32, -1}, 9);
  }
}
