// SPDX-License-Identifier: Apache-2.0
#include "weights.h"

#include <utility>

namespace sweep {

std::string Class::name() const {
  static const char* const kinds[] = {"int", "table", "tile-table", "row-table", "group-table"};
  static const char* const modes[] = {"float", "int8", "int8_group"};
  return std::string(kinds[kind]) + std::to_string(bits) + "/" + modes[activations];
}

std::vector<Class> all_classes() {
  std::vector<Class> classes;
  for (int kind = Class::kInt; kind <= Class::kGroupTable; ++kind)
    for (int bits = 1; bits <= 8; ++bits)
      for (qk_activations a : {QK_ACT_FLOAT, QK_ACT_INT8, QK_ACT_INT8_GROUP}) {
        if (kind == Class::kTileTable && bits != 3) continue;
        classes.push_back({(Class::Kind)kind, bits, a});
      }
  return classes;
}

namespace {

Flush side(Random& random) { return random.one_in(2) ? Flush::kBegin : Flush::kEnd; }

// A power of two in 2^-3 .. 2^3.
double power(Random& random) { return std::ldexp(1.0, (int)random.between(-3, 3)); }

}  // namespace

void Weight::draw(const Class& c, const Shape& shape, int64_t index, Random& random, bool exact) {
  weight_ = {};
  weight_.struct_size = sizeof weight_;
  weight_.kind = c.kind == Class::kInt ? QK_KIND_INT : QK_KIND_TABLE;
  weight_.bits = c.bits;
  weight_.activations = c.activations;
  weight_.n = shape.n;
  weight_.k = shape.k;
  weight_.group = shape.group;
  weight_.table_scale = 1.f;
  exact_ = exact;
  group_ = shape.group > 0 && shape.group < shape.k ? shape.group : shape.k;
  groups_ = ceil_div(shape.k, group_);
  draw_codes(random, index);
  draw_scales(random, index);
  if (c.kind == Class::kInt)
    draw_zeros(random, index);
  else
    draw_tables(random, c.kind);
  if (random.one_in(4)) {
    int32_t* perm = (int32_t*)perm_.place(4 * shape.k, side(random), 4);
    for (int64_t i = 0; i < shape.k; ++i) perm[i] = (int32_t)i;
    for (int64_t i = shape.k - 1; i > 0; --i) std::swap(perm[i], perm[random.below(i + 1)]);
    weight_.perm = perm;
  }
}

void Weight::draw_codes(Random& random, int64_t index) {
  const int64_t n = weight_.n, k = weight_.k;
  const int bits = weight_.bits, most = (1 << bits) - 1;
  codes_.resize((size_t)(n * k));
  // Every eighth weight has the extremes only: sums at the end of their range.
  const int pattern = index % 8 == 7 ? (int)random.between(1, 4) : 0;
  for (int64_t i = 0; i < n * k; ++i) {
    const int64_t column = i % k;
    const bool high = pattern == 1 || (pattern == 3 && column % 2) || (pattern == 4 && column & 2);
    codes_[(size_t)i] = (uint8_t)(pattern == 0 ? random.below(most + 1) : high ? most : 0);
  }
  const int64_t row = ceil_div(k * bits, 8), stride = row + (random.one_in(2) ? 0 : 3);
  uint8_t* stream = stream_.place((n - 1) * stride + row, side(random), 1, 0, 0);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t i = 0; i < k * bits; ++i)
      if (codes_[(size_t)(r * k + i / bits)] >> (i % bits) & 1)
        stream[r * stride + i / 8] |= (uint8_t)(1 << (i % 8));
  weight_.codes = stream;
  weight_.codes_stride_bytes = stride;
}

void Weight::draw_scales(Random& random, int64_t index) {
  static const qk_dtype dtypes[] = {QK_F16, QK_F32, QK_BF16, QK_E8M0, QK_E4M3, QK_F32};
  const int choice = (int)(index % 7);
  if (choice == 6) return;  // no scales
  const qk_dtype dtype = dtypes[choice];
  const int64_t stride = groups_ + (random.one_in(3) ? 2 : 0);
  const int64_t count = (weight_.n - 1) * stride + groups_;
  uint8_t* data = scales_.place(count * size_of(dtype), side(random), size_of(dtype), 0, 0);
  const bool wild = !exact_ && random.one_in(8);  // far from 1, subnormal, zero
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == QK_E8M0) {
      data[i] = (uint8_t)(wild ? random.between(0, 200) : random.between(124, 130));
    } else if (dtype == QK_E4M3) {
      data[i] = (uint8_t)(exact_ ? random.between(4, 10) << 3 : random.below(127));
      if (wild && random.one_in(2)) data[i] |= 0x80;
    } else {
      const int exponent =
          (int)(dtype == QK_F16 ? random.between(-24, 9) : random.between(-90, 30));
      const double drawn = 0.55 + 0.45 * random.symmetric();
      const double value = exact_ ? power(random) : wild ? std::ldexp(drawn, exponent) : drawn;
      encode(dtype, data, i, wild && random.one_in(9) ? 0.0 : value);
    }
  }
  weight_.scales = data;
  weight_.scale_dtype = dtype;
  weight_.scales_stride = stride;
}

void Weight::draw_zeros(Random& random, int64_t index) {
  static const qk_dtype dtypes[] = {QK_U8, QK_F32, QK_F16, QK_BF16};
  const int choice = (int)(index / 7 % 8);
  if (choice >= 5) return;  // symmetric
  const qk_dtype dtype = dtypes[choice % 4];
  const int64_t stride = groups_ + (random.one_in(3) ? 1 : 0);
  const int64_t count = (weight_.n - 1) * stride + groups_;
  uint8_t* data = zeros_.place(count * size_of(dtype), side(random), size_of(dtype), 0, 0);
  const bool whole = exact_ || choice == 4 || random.one_in(3);
  for (int64_t i = 0; i < count; ++i) {
    double zero = (double)random.below((int64_t)1 << weight_.bits);
    if (dtype != QK_U8 && !whole) zero += 4 * random.symmetric();
    encode(dtype, data, i, zero);
  }
  weight_.zeros = data;
  weight_.zero_dtype = dtype;
  weight_.zeros_stride = stride;
}

int64_t Weight::tables() const {
  if (weight_.table_per == QK_TABLE_PER_TENSOR) return 1;
  if (weight_.table_per == QK_TABLE_PER_TILE) return ceil_div(weight_.n, 8) * groups_;
  return weight_.table_per == QK_TABLE_PER_ROW ? weight_.n : weight_.n * groups_;
}

void Weight::draw_tables(Random& random, Class::Kind kind) {
  weight_.table_per = kind == Class::kTable       ? QK_TABLE_PER_TENSOR
                      : kind == Class::kTileTable ? QK_TABLE_PER_TILE
                      : kind == Class::kRowTable  ? QK_TABLE_PER_ROW
                                                  : QK_TABLE_PER_GROUP;
  const int64_t entries = tables() << weight_.bits;
  float* table = (float*)codebook_.place(4 * entries, side(random), 4);
  for (int64_t i = 0; i < entries; ++i) {
    if (weight_.activations != QK_ACT_FLOAT)
      table[i] =
          (float)(random.one_in(8) ? (random.one_in(2) ? -128 : 127) : random.between(-128, 127));
    else
      table[i] = exact_ ? (float)random.between(-8, 8) : (float)random.symmetric();
    if (kind == Class::kTileTable) {  // numbers that float16 holds
      const uint16_t half = encode_half(QK_F16, table[i]);
      table[i] = (float)decode(QK_F16, &half, 0);
    }
  }
  weight_.codebook = table;
  static const float table_scales[] = {1.f, 0.5f, -2.f, 0.3f};
  weight_.table_scale = exact_ ? (random.one_in(2) ? 1.f : 0.5f) : random.pick(table_scales);
}

qk_status Weight::pack(Random& random) {
  int64_t bytes = 0;
  if (qk_status s = qk_packed_bytes(&weight_, &bytes)) return s;
  // Uninitialised bytes must not matter: the block starts as noise.
  const uint8_t noise = (uint8_t)random.next();
  packed_.place(bytes, side(random), 64, 0, noise);
  const qk_status status = qk_pack(&weight_, packed_.data(), bytes);
  packed_.lock();
  return status;
}

double Weight::scale(int64_t n, int64_t k) const {
  if (!weight_.scales) return 1;
  return decode(weight_.scale_dtype, weight_.scales, n * weight_.scales_stride + k / group_);
}

double Weight::zero(int64_t n, int64_t k) const {
  if (!weight_.zeros) return 0;
  return decode(weight_.zero_dtype, weight_.zeros, n * weight_.zeros_stride + k / group_);
}

double Weight::value(int64_t n, int64_t k) const {
  const int c = code(n, k);
  if (weight_.kind == QK_KIND_INT) return weight_.zeros ? c : c - (1 << (weight_.bits - 1));
  const int64_t table = weight_.table_per == QK_TABLE_PER_TENSOR ? 0
                        : weight_.table_per == QK_TABLE_PER_TILE ? n / 8 * groups_ + k / group_
                        : weight_.table_per == QK_TABLE_PER_ROW  ? n
                                                                 : n * groups_ + k / group_;
  return weight_.codebook[(table << weight_.bits) + c];
}

bool Weight::same_parts(const qk_weight_out& out) const {
  const int64_t n = weight_.n, row = ceil_div(weight_.k * weight_.bits, 8);
  bool same = true;
  for (int64_t r = 0; r < n; ++r) {
    same = same && std::memcmp(out.codes + r * row, weight_.codes + r * weight_.codes_stride_bytes,
                               (size_t)row) == 0;
    const auto equal = [&](const void* got, const void* given, qk_dtype dtype, int64_t stride) {
      const size_t size = (size_t)size_of(dtype), bytes = size * (size_t)groups_;
      return !given || std::memcmp((const uint8_t*)got + (size_t)r * bytes,
                                   (const uint8_t*)given + size * (size_t)(r * stride), bytes) == 0;
    };
    same = same && equal(out.scales, weight_.scales, weight_.scale_dtype, weight_.scales_stride) &&
           equal(out.zeros, weight_.zeros, weight_.zero_dtype, weight_.zeros_stride);
  }
  if (weight_.codebook)
    same = same && std::memcmp(out.codebook, weight_.codebook,
                               sizeof(float) * (size_t)(tables() << weight_.bits)) == 0;
  if (weight_.perm) same = same && std::memcmp(out.perm, weight_.perm, 4 * (size_t)weight_.k) == 0;
  return same;
}

std::string Weight::describe() const {
  static const char* const dtypes[] = {"f32", "f16", "bf16", "u8", "i8", "i32", "e8m0", "e4m3"};
  char text[160];
  std::snprintf(text, sizeof text, "n %lld k %lld group %lld scales %s zeros %s%s%s%s",
                (long long)weight_.n, (long long)weight_.k, (long long)weight_.group,
                weight_.scales ? dtypes[weight_.scale_dtype] : "none",
                weight_.zeros ? dtypes[weight_.zero_dtype] : "none", weight_.perm ? " perm" : "",
                weight_.table_scale != 1.f ? " table_scale" : "", exact_ ? " exact" : "");
  return text;
}

}  // namespace sweep
