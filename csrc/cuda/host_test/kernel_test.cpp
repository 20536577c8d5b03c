// SPDX-License-Identifier: Apache-2.0
// The linear kernels' own source on the emulated device: preparation of activations, main loop,
// split sums, for every converter, shape, kind of group and tail.
//
// Oracle 1 (exact): powers of two as scales, small integers else, so that every sum is exact in
// float32: equal to float64, bit for bit. Oracle 2 (real values): float32 additions in any order
// err by at most (additions) * 2^-24 of the sum of magnitudes; tables add half an ulp of the 16-bit
// type.
#include <math.h>

#include <string>
#include <vector>

#include "../list_tiles.cuh"
#include "../plan.h"
#include "../quantize.cuh"
#include "device.h"
#include "weights.h"

using namespace qkern;
using namespace qkern::cuda;

namespace {

constexpr int kSms = 4;  // small enough that K is split, and that it is not

struct Problem {
  Case weight;
  int64_t m;
  int x_dtype = QK_F16, y_dtype = QK_F32;
  bool bias = false, in_place = true;
};

template <class C>
void run_shape(const LinearParams& p, const Schedule& s) {
  const emulator::Dim grid = {(unsigned)(s.row_groups * s.token_tiles), (unsigned)s.split, 1};
  const auto go = [&](auto index) {
    constexpr int kShape = decltype(index)::value;
    using D = Chassis<C, kShape>;
    const int bytes = D::shared_bytes(p);
    CHECK(bytes <= kSharedLimit, "%d bytes of shared memory", bytes);
    emulator::launch(grid, D::kS.threads(), (size_t)bytes, [&] { linear_kernel<C, kShape>(p); });
  };
  if (s.shape == 0) go(std::integral_constant<int, 0>());
  if (s.shape == 1) go(std::integral_constant<int, 1>());
  if (s.shape == 2) go(std::integral_constant<int, 2>());
  if (s.shape == 3) go(std::integral_constant<int, 3>());
}

template <class F>
void with_bits(int bits, F&& f) {
  if (bits == 2) f(std::integral_constant<int, 2>());
  if (bits == 3) f(std::integral_constant<int, 3>());
  if (bits == 4) f(std::integral_constant<int, 4>());
}

// bfloat16 in few kernels only: the types differ in the converters, which have their own tests, and
// in the block tables.
void run_float(const HostWeight& h, qk_dtype x_dtype, const LinearParams& p, const Schedule& s) {
  const Layout& l = h.layout;
  const bool brain = x_dtype == QK_BF16;
  if (l.order == Order::kSplit)
    return l.bits == 8 ? run_shape<Int8<F16>>(p, s)
           : brain     ? run_shape<Int4<BF16>>(p, s)
                       : run_shape<Int4<F16>>(p, s);
  if (l.bits == 4 && l.table_per == QK_TABLE_PER_TENSOR) return run_shape<Pairs4<F16>>(p, s);
  with_bits(l.bits, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    if (!l.block_table_bytes) return run_shape<Table<F16, kBits, Tables::kRows>>(p, s);
    brain ? run_shape<Table<BF16, kBits, Tables::kBlocks>>(p, s)
          : run_shape<Table<F16, kBits, Tables::kBlocks>>(p, s);
  });
}

void run_bytes(const HostWeight& h, const LinearParams& p, const Schedule& s) {
  const Layout& l = h.layout;
  if (l.order == Order::kByte)
    return l.bits == 8 ? run_shape<Bytes8>(p, s) : run_shape<Bytes4>(p, s);
  with_bits(l.bits, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    l.block_table_bytes ? run_shape<ByteTable<kBits, Tables::kBlocks>>(p, s)
                        : run_shape<ByteTable<kBits, Tables::kRows>>(p, s);
  });
}

struct Result {
  std::vector<float> y;
  int split;
};

struct Inputs {
  Buffer<uint8_t> x;
  Buffer<float> bias;
  int64_t row_stride;
};

Inputs make_inputs(const Problem& q, uint64_t seed) {
  Random random(seed);
  Inputs in;
  const int64_t k = q.weight.k;
  // Rows that cannot be read in place have an odd stride; the last row ends with its last element.
  in.row_stride = q.in_place ? (k + 7) / 8 * 8 + 8 : k + 1;
  const int64_t elements = (q.m - 1) * in.row_stride + k;
  in.x = Buffer<uint8_t>(elements * dtype_size(q.x_dtype));
  for (int64_t r = 0; r < q.m; ++r)
    for (int64_t c = 0; c < k; ++c)
      store_float(in.x.data, q.x_dtype, r * in.row_stride + c,
                  q.weight.exact ? (float)(random.below(9) - 4) : random.uniform() * 4);
  in.bias = Buffer<float>(q.bias ? q.weight.n : 0);
  for (int64_t i = 0; i < in.bias.count; ++i)
    in.bias[i] = q.weight.exact ? (float)(random.below(64) - 32) : random.uniform();
  return in;
}

// With experts, `packed` holds their weights one after the other.
Result run(const Problem& q, const HostWeight& h, const Inputs& in, int64_t first_row, int64_t m,
           const uint8_t* packed = nullptr, const Experts& experts = {}) {
  const Layout& l = h.layout;
  qk_cuda_linear_args a = {};
  a.struct_size = sizeof a;
  a.weight = &h.w;
  a.packed = packed ? packed : h.packed.data;
  a.x_dtype = q.x_dtype;
  a.x = in.x.data + first_row * in.row_stride * dtype_size(q.x_dtype);
  a.m = m;
  a.x_row_stride = in.row_stride;
  a.x_col_stride = 1;
  a.bias = q.bias ? in.bias.data : nullptr;
  a.y_dtype = q.y_dtype;
  a.y_row_stride = l.n + 5;
  Buffer<uint8_t> y(((m - 1) * a.y_row_stride + l.n) * dtype_size(q.y_dtype));
  a.y = y.data;
  Plan plan = {};
  const char* const reason = make_plan(a, experts, l, kSms, &plan);
  CHECK(!reason, "%s", reason);
  const bool readable =
      l.k % 8 == 0 && (uintptr_t)a.x % 16 == 0 && (m == 1 || in.row_stride % 8 == 0);
  const bool same_columns = !l.perm && (l.groups == 1 || l.group == l.group_padded);
  CHECK(plan.bytes || plan.in_place == (readable && same_columns),
        "activations are read in place where they can be");
  Buffer<uint8_t> workspace(plan.workspace());
  a.workspace = workspace.data;
  const Schedule& s = plan.schedule;
  const int tokens = shape_of(s.shape, plan.bytes).tokens();
  const auto list_tiles = [&](const LinearParams& p) {
    emulator::launch({1, 1, 1}, kListThreads, 0, [&] {
      list_tiles_kernel(experts.offsets, experts.count, m, tokens, s.token_tiles,
                        (ExpertTile*)p.tiles);
    });
  };
  const LinearParams p = make_params(a, experts, plan);
  if (experts.count) list_tiles(p);
  if (!plan.in_place) {
    const Activations x = make_activations(a, plan);
    const Gather gather = make_gather(a, experts, plan);
    const int64_t groups = div_up(x.k, plan.x_group);
    if (plan.bytes)
      emulator::launch({(unsigned)m, (unsigned)groups, 1}, kQuantizeThreads, 0, [&] {
        quantize_kernel(x, plan.x_group, group_out(plan.x_group, gather, l.k_padded, x.k), gather,
                        l.k_padded, (int8_t*)workspace.data, l.k_padded, (float*)p.x_scales);
      });
    else
      emulator::launch({(unsigned)m, 2, 1}, kQuantizeThreads, 0,
                       [&] { gather_kernel(x, gather, (uint16_t*)workspace.data); });
  }
  if (plan.bytes)
    run_bytes(h, p, s);
  else
    run_float(h, q.x_dtype, p, s);
  if (s.split > 1) {
    const emulator::Dim grid = {(unsigned)(s.token_tiles * tokens),
                                (unsigned)div_up<int64_t>(l.n, kAddRows), 1};
    emulator::launch(grid, kAddThreads, 0, [&] {
      plan.bytes ? add_splits<true>(p, tokens, s.split, plan.shift)
                 : add_splits<false>(p, tokens, s.split, 0);
    });
  }
  Result result;
  result.split = s.split;
  for (int64_t r = 0; r < m; ++r)
    for (int64_t n = 0; n < l.n; ++n)
      result.y.push_back(load_float(y.data, q.y_dtype, r * a.y_row_stride + n));
  // Between the rows of y nothing was written.
  const int size = dtype_size(q.y_dtype);
  for (int64_t r = 0; r + 1 < m; ++r)
    for (int64_t b = (r * a.y_row_stride + l.n) * size; b < (r + 1) * a.y_row_stride * size; ++b)
      CHECK(y[b] == 0xff, "written beside y");
  return result;
}

// x as the kernel multiplies it, in input order: quantized where activations are int8.
double activation(const Problem& q, const Inputs& in, const Layout& l, int64_t r, int64_t column,
                  int64_t weight_column, std::vector<double>* cache) {
  if (l.activations == QK_ACT_FLOAT)
    return load_float(in.x.data, q.x_dtype, r * in.row_stride + column);
  (void)weight_column;
  return (*cache)[(size_t)(r * l.k + column)];
}

// Quantized and multiplied back by their scales: what int8 kernels have to compute with.
std::vector<double> quantized_inputs(const Problem& q, const HostWeight& h, const Inputs& in) {
  const Layout& l = h.layout;
  std::vector<double> out((size_t)(q.m * l.k));
  const int64_t group = l.activations == QK_ACT_INT8 ? l.k
                        : l.groups > 1               ? l.group
                                                     : min64(128, l.k);
  for (int64_t r = 0; r < q.m; ++r)
    for (int64_t begin = 0; begin < l.k; begin += group) {
      const int64_t end = min64(begin + group, l.k);
      const auto column = [&](int64_t c) { return h.w.perm ? (int64_t)h.perm[c] : c; };
      float largest = 0;
      for (int64_t c = begin; c < end; ++c)
        largest =
            fmaxf(largest, fabsf(load_float(in.x.data, q.x_dtype, r * in.row_stride + column(c))));
      const QuantizeScale s = quantize_scale(float_bits(largest));
      for (int64_t c = begin; c < end; ++c)
        out[(size_t)(r * l.k + column(c))] =
            (double)s.scale *
            quantized(load_float(in.x.data, q.x_dtype, r * in.row_stride + column(c)), s);
    }
  return out;
}

void compare(const Problem& q, const HostWeight& h, const Inputs& in, const Result& result) {
  const Layout& l = h.layout;
  std::vector<double> cache;
  if (l.activations != QK_ACT_FLOAT) cache = quantized_inputs(q, h, in);
  int64_t nonzero = 0;
  for (int64_t r = 0; r < q.m; ++r)
    for (int64_t n = 0; n < l.n; ++n) {
      double sum = q.bias ? in.bias[n] : 0., magnitude = fabs(sum), table_error = 0;
      for (int64_t c = 0; c < l.k; ++c) {
        const int64_t column = h.w.perm ? h.perm[c] : c;
        double size;
        const double x = activation(q, in, l, r, column, c, &cache);
        sum += x * h.value(n, c, &size);
        magnitude += fabs(x) * size;
        if (h.w.kind == QK_KIND_TABLE)
          table_error +=
              fabs(x) * (size * (q.x_dtype == QK_F16 ? 0x1p-11 : 0x1p-8) + 0.02 * 0x1p-24);
      }
      const float got = result.y[(size_t)(r * l.n + n)];
      nonzero += got != 0;
      if (q.weight.exact && l.activations == QK_ACT_FLOAT) {
        CHECK((double)got == sum,
              "kind %d bits %d m %lld n %lld k %lld group %lld row %lld column %lld: %.9g for %.9g",
              h.w.kind, l.bits, (long long)q.m, (long long)l.n, (long long)l.k, (long long)l.group,
              (long long)r, (long long)n, got, sum);
        continue;
      }
      // Additions: columns, x sums, three per group, splits and warps.
      const double additions = (double)(2 * l.k + 3 * l.groups + 32);
      double bound = magnitude * additions * 0x1p-24 + table_error * 1.01;
      if (q.y_dtype != QK_F32)
        bound += fabs(sum) * (q.y_dtype == QK_F16 ? 0x1p-11 : 0x1p-8) * 1.01 + 0x1p-24;
      CHECK(
          fabs(got - sum) <= bound,
          "bits %d m %lld n %lld k %lld group %lld row %lld column %lld: %.9g for %.9g, bound %.3g",
          l.bits, (long long)q.m, (long long)l.n, (long long)l.k, (long long)l.group, (long long)r,
          (long long)n, got, sum, bound);
    }
  CHECK(q.m * l.n < 8 || nonzero > q.m * l.n / 8, "results are not all zero");
}

// The CPU contract of int8 with one scale per row, in its own arithmetic: same bits wanted.
void compare_exact_int8(const Problem& q, const HostWeight& h, const Inputs& in,
                        const Result& result) {
  const Layout& l = h.layout;
  for (int64_t r = 0; r < q.m; ++r) {
    float largest = 0;
    for (int64_t c = 0; c < l.k; ++c)
      largest = fmaxf(largest, fabsf(load_float(in.x.data, q.x_dtype, r * in.row_stride + c)));
    const QuantizeScale s = quantize_scale(float_bits(largest));
    std::vector<int> x((size_t)l.k);
    for (int64_t c = 0; c < l.k; ++c)
      x[(size_t)c] = quantized(
          load_float(in.x.data, q.x_dtype, r * in.row_stride + (h.w.perm ? h.perm[c] : c)), s);
    for (int64_t n = 0; n < l.n; ++n) {
      int64_t sum = 0;
      for (int64_t c = 0; c < l.k; ++c) {
        const int code = h.code(n, c);
        sum += x[(size_t)c] *
               (h.w.kind == QK_KIND_TABLE ? (int)h.entry(n, 0, code) : code - (1 << (l.bits - 1)));
      }
      const float acc = (float)sum * (float)h.scale(n, 0);
      const float scale = s.scale * h.w.table_scale;
      const float y = q.bias ? fmaf(acc, scale, in.bias[n]) : acc * scale;
      CHECK(float_bits(result.y[(size_t)(r * l.n + n)]) == float_bits(y),
            "row %lld column %lld: %.9g, not %.9g", (long long)r, (long long)n,
            result.y[(size_t)(r * l.n + n)], y);
    }
  }
}

Result run_and_compare(const Problem& q, uint64_t seed) {
  const HostWeight h = make_weight(q.weight, seed);
  const Inputs in = make_inputs(q, seed + 1);
  const Result result = run(q, h, in, 0, q.m);
  compare(q, h, in, result);
  if (h.layout.activations == QK_ACT_INT8 && h.layout.groups == 1 && !h.w.zeros)
    compare_exact_int8(q, h, in, result);
  return result;
}

// Mixture of experts: every row has its expert's product; rows of none stay unwritten. The number
// of splits.
int check_experts(const Problem& q, const std::vector<int64_t>& offsets, uint64_t seed) {
  const int64_t experts = (int64_t)offsets.size() - 1;
  std::vector<HostWeight> weights;
  std::vector<float> table_scales;
  for (int64_t e = 0; e < experts; ++e) {
    weights.push_back(make_weight(q.weight, seed + (uint64_t)e));
    if (q.weight.kind == QK_KIND_TABLE) weights.back().w.table_scale = ldexpf(1.f, (int)(e % 3));
    table_scales.push_back(weights.back().w.table_scale);
  }
  const int64_t bytes = weights[0].layout.total_bytes, n = q.weight.n;
  Buffer<uint8_t> packed(experts * bytes);
  for (int64_t e = 0; e < experts; ++e)
    memcpy(packed.data + e * bytes, weights[(size_t)e].packed.data, (size_t)bytes);
  Problem all = q;
  all.weight.n = experts * n;  // of biases
  const Inputs in = make_inputs(all, seed + 100);
  Experts list = {experts, offsets.data(), nullptr};
  if (q.weight.kind == QK_KIND_TABLE) list.table_scales = table_scales.data();
  const Result whole = run(q, weights[0], in, 0, q.m, packed.data, list);
  std::vector<char> owned((size_t)q.m);
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t begin = offsets[(size_t)e], rows = offsets[(size_t)e + 1] - begin;
    if (rows <= 0) continue;
    Problem one = q;
    one.m = rows;
    Inputs part;
    part.row_stride = in.row_stride;
    const int64_t row_bytes = in.row_stride * dtype_size(q.x_dtype);
    part.x = Buffer<uint8_t>((rows - 1) * row_bytes + q.weight.k * dtype_size(q.x_dtype));
    memcpy(part.x.data, in.x.data + begin * row_bytes, (size_t)part.x.count);
    part.bias = Buffer<float>(q.bias ? n : 0);
    for (int64_t i = 0; i < part.bias.count; ++i) part.bias[i] = in.bias[e * n + i];
    Result result;
    result.y.assign(whole.y.begin() + begin * n, whole.y.begin() + (begin + rows) * n);
    compare(one, weights[(size_t)e], part, result);
    if (whole.split > 1) {  // the same bits where no other expert has rows
      std::vector<int64_t> alone((size_t)experts + 1, rows);
      std::fill(alone.begin(), alone.begin() + e + 1, 0);
      const Experts only = {experts, alone.data(), list.table_scales};
      const Result again = run(q, weights[0], in, begin, rows, packed.data, only);
      CHECK(again.split == whole.split, "split depends on m");
      for (int64_t i = 0; i < rows * n; ++i)
        CHECK(float_bits(again.y[(size_t)i]) == float_bits(result.y[(size_t)i]),
              "expert %lld differs from the batch", (long long)e);
    }
    for (int64_t r = begin; r < begin + rows; ++r) owned[(size_t)r] = 1;
  }
  for (int64_t r = 0; r < q.m; ++r)
    for (int64_t i = 0; i < n && !owned[(size_t)r]; ++i)
      CHECK(whole.y[(size_t)(r * n + i)] != whole.y[(size_t)(r * n + i)], "row %lld was written",
            (long long)r);
  return whole.split;
}

// Row i alone, in a small batch and in the whole: same bits inside a family.
void check_batch_invariance(const Problem& q, uint64_t seed) {
  const HostWeight h = make_weight(q.weight, seed);
  const Inputs in = make_inputs(q, seed + 1);
  const Result whole = run(q, h, in, 0, q.m);
  const auto same = [&](int64_t first, int64_t m) {
    const Result part = run(q, h, in, first, m);
    CHECK(part.split == whole.split, "split depends on m");
    for (int64_t i = 0; i < m * h.layout.n; ++i)
      CHECK(float_bits(part.y[(size_t)i]) == float_bits(whole.y[(size_t)(first * h.layout.n + i)]),
            "rows %lld..%lld of %lld differ from the batch", (long long)first,
            (long long)(first + m - 1), (long long)q.m);
  };
  if (q.m <= kDecodeTokens) {
    same(0, 1);
    same(q.m - 1, 1);
    same(3, 11);
    same(1, 20);
  } else {
    same(2, 66);
    same(q.m - 65, 65);
  }
}

}  // namespace

void check_kernels() {
  uint64_t seed = 100;
  std::vector<Case> formats;
  const auto add = [&](Case c) {
    for (const bool exact : {true, false}) {
      c.exact = exact;
      formats.push_back(c);
    }
  };
  // Integers: per row, aligned, fine and ragged groups; with and without zeros; types of scales.
  add({QK_KIND_INT, 4, QK_ACT_FLOAT, 70, 392, 128, 0, QK_F16, -1});
  add({QK_KIND_INT, 4, QK_ACT_FLOAT, 70, 392, 0, 0, QK_F32, QK_F16});
  add({QK_KIND_INT, 4, QK_ACT_FLOAT, 70, 392, 16, 0, QK_F32, QK_F32});
  add({QK_KIND_INT, 4, QK_ACT_FLOAT, 70, 393, 24, 0, QK_BF16, QK_U8, true});
  add({QK_KIND_INT, 4, QK_ACT_FLOAT, 130, 330, 32, 0, QK_F16, QK_U8});
  add({QK_KIND_INT, 8, QK_ACT_FLOAT, 70, 392, 64, 0, QK_F16, -1});
  add({QK_KIND_INT, 8, QK_ACT_FLOAT, 70, 300, 0, 0, QK_F32, QK_F16});
  add({QK_KIND_INT, 3, QK_ACT_FLOAT, 70, 330, 64, 0, QK_F16, QK_U8});
  add({QK_KIND_INT, 2, QK_ACT_FLOAT, 70, 330, 80, 0, QK_F16, -1});
  add({QK_KIND_TABLE, 4, QK_ACT_FLOAT, 70, 330, 64, QK_TABLE_PER_TENSOR, QK_F16});
  add({QK_KIND_TABLE, 4, QK_ACT_FLOAT, 70, 330, 16, QK_TABLE_PER_TENSOR, QK_E4M3});
  add({QK_KIND_TABLE, 4, QK_ACT_FLOAT, 70, 330, 32, QK_TABLE_PER_TENSOR, QK_E8M0});
  add({QK_KIND_TABLE, 4, QK_ACT_FLOAT, 70, 330, 0, QK_TABLE_PER_ROW, -1});
  add({QK_KIND_TABLE, 3, QK_ACT_FLOAT, 70, 330, 0, QK_TABLE_PER_ROW, -1, -1, true});
  add({QK_KIND_TABLE, 2, QK_ACT_FLOAT, 70, 330, 48, QK_TABLE_PER_ROW, QK_F32});
  // A table per group (also of ragged groups, with scales, permuted) and per tile.
  add({QK_KIND_TABLE, 4, QK_ACT_FLOAT, 70, 330, 64, QK_TABLE_PER_GROUP, -1});
  add({QK_KIND_TABLE, 4, QK_ACT_FLOAT, 130, 520, 128, QK_TABLE_PER_GROUP, QK_F16});
  add({QK_KIND_TABLE, 3, QK_ACT_FLOAT, 70, 330, 100, QK_TABLE_PER_GROUP, -1, -1, true});
  add({QK_KIND_TABLE, 2, QK_ACT_FLOAT, 70, 330, 32, QK_TABLE_PER_GROUP, QK_F32});
  add({QK_KIND_TABLE, 4, QK_ACT_FLOAT, 70, 60, 64, QK_TABLE_PER_GROUP, -1});
  add({QK_KIND_TABLE, 3, QK_ACT_FLOAT, 70, 330, 64, QK_TABLE_PER_TILE, -1});
  add({QK_KIND_TABLE, 3, QK_ACT_FLOAT, 130, 50, 64, QK_TABLE_PER_TILE, -1});
  for (const int activations : {QK_ACT_INT8, QK_ACT_INT8_GROUP}) {
    add({QK_KIND_TABLE, 4, activations, 70, 333, 0, QK_TABLE_PER_ROW, QK_F32});
    add({QK_KIND_TABLE, 3, activations, 70, 333, 0, QK_TABLE_PER_ROW, QK_F32, -1, true});
    add({QK_KIND_TABLE, 2, activations, 70, 333, 0, QK_TABLE_PER_TENSOR, QK_F32});
    add({QK_KIND_TABLE, 4, activations, 70, 333, 32, QK_TABLE_PER_TENSOR, QK_F16});
    add({QK_KIND_TABLE, 4, activations, 70, 333, 16, QK_TABLE_PER_TENSOR, QK_E4M3});
    add({QK_KIND_TABLE, 4, activations, 70, 333, 64, QK_TABLE_PER_GROUP, QK_F32});
    add({QK_KIND_TABLE, 3, activations, 70, 520, 128, QK_TABLE_PER_GROUP, QK_F32});
    add({QK_KIND_TABLE, 2, activations, 70, 333, 40, QK_TABLE_PER_GROUP, QK_F16, -1, true});
    add({QK_KIND_TABLE, 3, activations, 70, 333, 64, QK_TABLE_PER_TILE, QK_E8M0});
    add({QK_KIND_INT, 3, activations, 70, 333, 0, 0, QK_F32, -1});
    add({QK_KIND_INT, 2, activations, 70, 333, 64, 0, QK_F16, QK_U8});
    add({QK_KIND_INT, 8, activations, 70, 333, 0, 0, QK_F32, -1});
    add({QK_KIND_INT, 4, activations, 70, 333, 64, 0, QK_F16, -1});
    add({QK_KIND_INT, 4, activations, 70, 333, 40, 0, QK_F16, QK_U8, true});
    add({QK_KIND_INT, 4, activations, 70, 600, 0, 0, QK_F32, QK_F16});
  }
  int64_t cases = 0;
  for (const Case& c : formats)
    for (const int64_t m : {1, 11, 19, 67}) {
      Problem q = {c, m};
      const bool brain =
          c.kind == QK_KIND_INT ? c.bits == 4 : c.table_per >= QK_TABLE_PER_GROUP && c.group < c.k;
      q.x_dtype = seed % 2 || (!brain && c.activations == QK_ACT_FLOAT) ? QK_F16 : QK_BF16;
      if (c.activations != QK_ACT_FLOAT && seed % 3 == 0) q.x_dtype = QK_F32;
      q.y_dtype = c.exact || seed % 3 ? QK_F32 : q.x_dtype;
      q.bias = seed % 2 == 0;
      q.in_place = seed % 5 != 0;
      run_and_compare(q, seed);
      seed += 3;
      ++cases;
    }
  CHECK(cases == (int64_t)formats.size() * 4 && cases > 350, "%lld cases", (long long)cases);
  // Split K (one row tile on four multiprocessors), all families.
  int splits = 0;
  for (const int64_t m : {2, 40, 70})
    for (const Case& c :
         {Case{QK_KIND_INT, 4, QK_ACT_FLOAT, 33, 2500, 128, 0, QK_F16},
          Case{QK_KIND_INT, 4, QK_ACT_INT8, 33, 2500, 0, 0, QK_F16},
          Case{QK_KIND_TABLE, 4, QK_ACT_INT8, 33, 2500, 0, QK_TABLE_PER_ROW, QK_F32},
          Case{QK_KIND_TABLE, 4, QK_ACT_FLOAT, 33, 2500, 192, QK_TABLE_PER_GROUP, -1},
          Case{QK_KIND_TABLE, 3, QK_ACT_FLOAT, 33, 2500, 64, QK_TABLE_PER_TILE, -1}}) {
      Problem q = {c, m};
      q.bias = m == 2;
      splits += run_and_compare(q, seed++).split > 1;
    }
  CHECK(splits == 15, "%d splits", splits);
  for (const int64_t m : {33, 90})
    check_batch_invariance(
        {{QK_KIND_INT, 4, QK_ACT_FLOAT, 20, 1300, 32, 0, QK_F16, QK_U8, false, false}, m}, seed);
  const std::vector<int64_t> few = {0, 3, 3, 20, 21}, gaps = {2, 2, 40, 41},
                             many = {0, 1, 150, 210};
  for (const Case& c :
       {Case{QK_KIND_INT, 4, QK_ACT_FLOAT, 70, 200, 64, 0, QK_F16},
        Case{QK_KIND_INT, 4, QK_ACT_FLOAT, 70, 200, 24, 0, QK_F16, QK_U8, true},
        Case{QK_KIND_TABLE, 4, QK_ACT_FLOAT, 70, 200, 16, QK_TABLE_PER_TENSOR, QK_E4M3},
        Case{QK_KIND_TABLE, 3, QK_ACT_FLOAT, 70, 200, 0, QK_TABLE_PER_ROW, -1},
        Case{QK_KIND_TABLE, 3, QK_ACT_FLOAT, 70, 200, 64, QK_TABLE_PER_TILE, -1},
        Case{QK_KIND_TABLE, 2, QK_ACT_FLOAT, 70, 200, 64, QK_TABLE_PER_GROUP, -1},
        Case{QK_KIND_INT, 8, QK_ACT_INT8, 70, 200, 0, 0, QK_F32},
        Case{QK_KIND_TABLE, 4, QK_ACT_INT8, 70, 200, 64, QK_TABLE_PER_TENSOR, QK_F16, -1, true},
        Case{QK_KIND_INT, 4, QK_ACT_INT8_GROUP, 70, 200, 64, 0, QK_F16, QK_U8}})
    for (const auto* offsets : {&few, &gaps, &many}) {
      Problem q = {c, offsets->back() + (offsets == &gaps ? 5 : 0)};
      q.bias = seed % 2 == 0;
      q.in_place = seed % 3 != 0;
      CHECK(check_experts(q, *offsets, seed++) == 1, "K is too short to be split");
    }
  for (const Case& c : {Case{QK_KIND_INT, 4, QK_ACT_FLOAT, 33, 2500, 128, 0, QK_F16},
                        Case{QK_KIND_TABLE, 4, QK_ACT_FLOAT, 33, 2500, 0, QK_TABLE_PER_TENSOR, -1},
                        Case{QK_KIND_TABLE, 4, QK_ACT_INT8, 33, 2500, 0, QK_TABLE_PER_ROW, QK_F32},
                        Case{QK_KIND_INT, 4, QK_ACT_INT8_GROUP, 33, 2500, 64, 0, QK_F16, QK_U8}})
    for (const auto* offsets : {&few, &gaps, &many}) {
      Problem q = {c, offsets->back() + (offsets == &gaps ? 5 : 0)};
      q.bias = offsets != &gaps;
      const int split = check_experts(q, *offsets, seed++);
      CHECK((split > 1) == (offsets != &many), "%d splits of %lld rows", split, (long long)q.m);
    }
  for (int64_t n = 1; n <= 9; ++n)
    for (int64_t k = 1; k <= 40; k += 13)
      run_and_compare({{QK_KIND_INT, 4, QK_ACT_FLOAT, n, k, 16, 0, QK_F16, -1}, n}, seed++);
}
