// SPDX-License-Identifier: Apache-2.0
// One row of canonical storage to floats, any format, 8 columns at a time.
//
// Eight codes of b bits lie in at most b + 1 bytes: a byte shuffle gives each dword lane the two
// bytes that hold its code, a variable shift brings it down. 8b bits are whole bytes, so one pair
// of shuffle and shift serves a whole group.
//
// Numbers: Int: scale * (code - zero), two roundings; table: (scale * table_scale) * entry.

#include "kernels.h"
#include "simd/rows_avx2.h"

namespace qkern {
namespace {

// How 8 codes that start `first_bit` (0..7) bits into a byte reach their lanes.
struct Spread {
  __m256i bytes, shifts, mask;

  Spread(int bits, int first_bit) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i bit = _mm256_add_epi32(_mm256_mullo_epi32(lane, _mm256_set1_epi32(bits)),
                                         _mm256_set1_epi32(first_bit));
    const __m256i byte = _mm256_srli_epi32(bit, 3);
    const __m256i pair =
        _mm256_or_si256(byte, _mm256_slli_epi32(_mm256_add_epi32(byte, _mm256_set1_epi32(1)), 8));
    bytes = _mm256_or_si256(pair, _mm256_set1_epi32((int)0x80800000u));
    shifts = _mm256_and_si256(bit, _mm256_set1_epi32(7));
    mask = _mm256_set1_epi32((1 << bits) - 1);
  }
  __m256i codes(__m128i stream) const {
    const __m256i pairs = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(stream), bytes);
    return _mm256_and_si256(_mm256_srlv_epi32(pairs, shifts), mask);
  }
};

// Codes that are bytes already.
struct Bytes {
  Bytes(int, int) {}
  __m256i codes(__m128i stream) const { return _mm256_cvtepu8_epi32(stream); }
};

struct Uniform {
  __m256 scale, zero;

  __m256 operator()(__m256i codes) const {
    return _mm256_mul_ps(scale, _mm256_sub_ps(_mm256_cvtepi32_ps(codes), zero));
  }
};

// Tables of up to 16 entries: two registers of 8, chosen by bit 3.
struct SmallTable {
  __m256 scale, low, high;

  SmallTable(float factor, const float* table, int entries) : scale(_mm256_set1_ps(factor)) {
    float all[16];
    for (int i = 0; i < 16; ++i) all[i] = table[i & (entries - 1)];
    low = _mm256_loadu_ps(all);
    high = _mm256_loadu_ps(all + 8);
  }
  __m256 operator()(__m256i codes) const {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    return _mm256_mul_ps(scale, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes),
                                                 _mm256_permutevar8x32_ps(high, codes), upper));
  }
};

struct LargeTable {
  __m256 scale;
  const float* entries;

  __m256 operator()(__m256i codes) const {
    return _mm256_mul_ps(scale, _mm256_i32gather_ps(entries, codes, 4));
  }
};

// Columns [begin, end), which share scale, zero and table.
template <qk_dtype OUT, class Stream, class Value>
void write_columns(const DequantizeRow& row, int64_t begin, int64_t end, const Value& value) {
  const int64_t first_bit = begin * row.stream_bits, step = row.stream_bits;
  const uint8_t* stream = row.codes + (first_bit >> 3);
  const uint8_t* stream_end = row.codes + ceil_div(row.k * row.stream_bits, 8);
  const Stream spread(row.bits, (int)(first_bit & 7));
  void* const out = row.out;
  int64_t k = begin;
  for (; k + 8 <= end && stream_end - stream >= 16; k += 8, stream += step)
    store_f32x8(out, OUT, k, value(spread.codes(_mm_loadu_si128((const __m128i*)stream))));
  for (; k < end; k += 8, stream += step) {
    uint8_t bytes[16] = {0};
    memcpy(bytes, stream, (size_t)min64(16, stream_end - stream));
    const __m256 values = value(spread.codes(_mm_loadu_si128((const __m128i*)bytes)));
    if (end - k >= 8)
      store_f32x8(out, OUT, k, values);
    else
      store_some_f32x8(out, OUT, k, end - k, values);
  }
}

template <class Stream, class Value>
void write_stream(const DequantizeRow& row, int64_t begin, int64_t end, const Value& value) {
  if (row.out_dtype == QK_F32)
    write_columns<QK_F32, Stream>(row, begin, end, value);
  else if (row.out_dtype == QK_F16)
    write_columns<QK_F16, Stream>(row, begin, end, value);
  else
    write_columns<QK_BF16, Stream>(row, begin, end, value);
}

template <class Value>
void write_group(const DequantizeRow& row, int64_t begin, int64_t end, const Value& value) {
  if (row.stream_bits == 8)
    write_stream<Bytes>(row, begin, end, value);
  else
    write_stream<Spread>(row, begin, end, value);
}

}  // namespace

void dequantize_any_avx2(const DequantizeRow& row) {
  const int entries = 1 << row.bits;
  for (int64_t g = 0; g * row.group < row.k; ++g) {
    const int64_t begin = g * row.group, end = min64(row.k, begin + row.group);
    const float scale = row.scales ? load_float(row.scales, row.scale_dtype, g) : 1.f;
    if (!row.table) {
      const float zero =
          row.zeros ? load_float(row.zeros, row.zero_dtype, g) : (float)(entries / 2);
      write_group(row, begin, end, Uniform{_mm256_set1_ps(scale), _mm256_set1_ps(zero)});
      continue;
    }
    const float* table = row.table + g * row.table_group_stride;
    const float factor = scale * row.table_scale;
    if (row.bits <= 4)
      write_group(row, begin, end, SmallTable(factor, table, entries));
    else
      write_group(row, begin, end, LargeTable{_mm256_set1_ps(factor), table});
  }
}

}  // namespace qkern
