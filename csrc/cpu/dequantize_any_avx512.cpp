// SPDX-License-Identifier: Apache-2.0
// One row of canonical storage to floats, any format, 16 columns at a time.
//
// Sixteen codes of b bits lie in at most 2b + 1 bytes: a byte shuffle gives each dword lane the two
// bytes that hold its code, a variable shift brings it down. 16b bits are whole bytes, so one pair
// of shuffle and shift serves a whole group. Up to 4 bits a group has at most 16 different values:
// they are computed once, in the dtype of the output, and looked up, 32 columns at a time where
// that dtype has 16 bits.
//
// Large results go past the caches where they are aligned: 4096 x 4096 in float32, one thread of an
// Intel core, int4-g128 from canonical storage 4.2 ms, from packed 4.5 ms (through the caches 9.8
// and 11.0 ms); a copy of as many floats 10.4 ms.
//
// Numbers: Int: scale * (code - zero), two roundings; table: (scale * table_scale) * entry.

#include "kernels.h"
#include "simd/rows_avx512.h"

namespace qkern {
namespace {

static inline __m512i lane_numbers() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// How 16 codes that start `first_bit` (0..7) bits into a byte reach their lanes.
struct Spread {
  __m512i bytes, shifts;

  Spread(int bits, int first_bit) {
    const __m512i bit = _mm512_add_epi32(
        _mm512_mullo_epi32(lane_numbers(), _mm512_set1_epi32(bits)), _mm512_set1_epi32(first_bit));
    const __m512i byte = _mm512_srli_epi32(bit, 3);
    const __m512i next = _mm512_add_epi32(byte, _mm512_set1_epi32(1));
    const __m512i pair = _mm512_or_si512(byte, _mm512_slli_epi32(next, 8));
    bytes = _mm512_or_si512(pair, _mm512_set1_epi32((int)0x80800000u));
    shifts = _mm512_and_si512(bit, _mm512_set1_epi32(7));
  }
  // Each lane's code in its lowest bits, anything above it.
  __m512i codes(__m128i stream) const {
    return _mm512_srlv_epi32(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(stream), bytes), shifts);
  }
};

// The same for 32 codes of up to 4 bits in word lanes.
struct WordSpread {
  __m512i bytes, shifts;

  WordSpread(int bits, int first_bit) {
    const __m512i bit_low = _mm512_add_epi32(
        _mm512_mullo_epi32(lane_numbers(), _mm512_set1_epi32(bits)), _mm512_set1_epi32(first_bit));
    const __m512i bit_high = _mm512_add_epi32(bit_low, _mm512_set1_epi32(16 * bits));
    const __m512i bit = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(bit_low)),
                                           _mm512_cvtepi32_epi16(bit_high), 1);
    const __m512i byte = _mm512_srli_epi16(bit, 3);
    const __m512i next = _mm512_add_epi16(byte, _mm512_set1_epi16(1));
    bytes = _mm512_or_si512(byte, _mm512_slli_epi16(next, 8));
    shifts = _mm512_and_si512(bit, _mm512_set1_epi16(7));
  }
  __m512i codes(__m128i stream) const {
    return _mm512_srlv_epi16(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(stream), bytes), shifts);
  }
};

// Codes that are bytes already.
struct Bytes {
  Bytes(int, int) {}
  __m512i codes(__m128i stream) const { return _mm512_cvtepu8_epi32(stream); }
};

// Codes of up to 4 bits: all values of a group, repeated over the 16 that vpermps tells apart.
struct FewValues {
  __m512 values;

  __m512 operator()(__m512i codes) const { return _mm512_permutexvar_ps(codes, values); }
};

struct Uniform {
  __m512i mask;
  __m512 scale, zero;

  __m512 operator()(__m512i codes) const {
    return _mm512_mul_ps(scale,
                         _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_and_si512(codes, mask)), zero));
  }
};

struct LargeTable {
  __m512i mask;
  __m512 scale;
  const float* entries;

  __m512 operator()(__m512i codes) const {
    return _mm512_mul_ps(scale, _mm512_i32gather_ps(_mm512_and_si512(codes, mask), entries, 4));
  }
};

// Whether vectors of 16 outputs from column `begin` on may be streamed.
static inline bool streams(const DequantizeRow& row, int64_t begin) {
  const int64_t size = row.out_dtype == QK_F32 ? 4 : 2;
  return row.past_caches && (reinterpret_cast<uintptr_t>(row.out) + begin * size) % 64 == 0;
}

// Columns [begin, end), which share scale, zero and table.
template <qk_dtype OUT, class Stream, class Value>
void write_columns(const DequantizeRow& row, int64_t begin, int64_t end, const Value& value) {
  const int64_t first_bit = begin * row.stream_bits, step = 2 * row.stream_bits;
  const uint8_t* stream = row.codes + (first_bit >> 3);
  const uint8_t* stream_end = row.codes + ceil_div(row.k * row.stream_bits, 8);
  const Stream spread(row.stream_bits, (int)(first_bit & 7));
  void* const out = row.out;
  int64_t k = begin;
  if (streams(row, begin))
    for (; k + 16 <= end && stream_end - stream >= 16; k += 16, stream += step)
      stream_f32x16(out, OUT, k, value(spread.codes(_mm_loadu_si128((const __m128i*)stream))));
  for (; k + 16 <= end && stream_end - stream >= 16; k += 16, stream += step)
    store_f32x16(out, OUT, k, value(spread.codes(_mm_loadu_si128((const __m128i*)stream))));
  for (; k < end; k += 16, stream += step) {
    const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes(stream_end - stream), stream);
    store_some_f32x16(out, OUT, k, first_lanes(end - k), value(spread.codes(bytes)));
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

// Codes of up to 4 bits. Words where the output has 16 bits and 32 codes lie in 16 bytes.
void write_few(const DequantizeRow& row, int64_t begin, int64_t end, const FewValues& few) {
  const int first_bit = (int)(begin * row.stream_bits & 7);
  const bool bytes = row.stream_bits == 8;
  if (row.out_dtype != QK_F32 && (bytes || first_bit + 32 * row.stream_bits <= 128)) {
    const __m256i half =
        row.out_dtype == QK_F16 ? f32_to_f16x16(few.values) : f32_to_bf16x16(few.values);
    const __m512i values = _mm512_broadcast_i64x4(half);
    uint16_t* const out = (uint16_t*)row.out;
    const bool streamed = streams(row, begin);
    const auto store = [&](int64_t k, __m512i v) {
      if (streamed)
        _mm512_stream_si512((__m512i*)(out + k), v);
      else
        _mm512_storeu_si512(out + k, v);
    };
    for (; bytes && begin + 32 <= end; begin += 32) {
      const __m512i codes =
          _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(row.codes + begin)));
      store(begin, _mm512_permutexvar_epi16(codes, values));
    }
    const WordSpread spread(row.stream_bits, first_bit);
    const uint8_t* stream = row.codes + (begin * row.stream_bits >> 3);
    const uint8_t* stream_end = row.codes + ceil_div(row.k * row.stream_bits, 8);
    for (; !bytes && begin + 32 <= end && stream_end - stream >= 16;
         begin += 32, stream += 4 * row.stream_bits) {
      const __m512i codes = spread.codes(_mm_loadu_si128((const __m128i*)stream));
      store(begin, _mm512_permutexvar_epi16(codes, values));
    }
  }
  write_group(row, begin, end, few);
}

}  // namespace

void dequantize_any_avx512(const DequantizeRow& row) {
  const int entries = 1 << row.bits;
  const __m512i mask = _mm512_set1_epi32(entries - 1);
  const __m512i code = _mm512_and_si512(lane_numbers(), mask);
  for (int64_t g = 0; g * row.group < row.k; ++g) {
    const int64_t begin = g * row.group, end = min64(row.k, begin + row.group);
    const float scale = row.scales ? load_float(row.scales, row.scale_dtype, g) : 1.f;
    if (row.table) {
      const float* table = row.table + g * row.table_group_stride;
      const __m512 factor = _mm512_set1_ps(scale * row.table_scale);
      if (row.bits > 4) {
        write_group(row, begin, end, LargeTable{mask, factor, table});
      } else {
        const __m512 values = _mm512_maskz_loadu_ps(first_lanes(entries), table);
        write_few(row, begin, end, {_mm512_mul_ps(factor, _mm512_permutexvar_ps(code, values))});
      }
      continue;
    }
    const float zero = row.zeros ? load_float(row.zeros, row.zero_dtype, g) : (float)(entries / 2);
    const Uniform uniform{mask, _mm512_set1_ps(scale), _mm512_set1_ps(zero)};
    if (row.bits > 4)
      write_group(row, begin, end, uniform);
    else
      write_few(row, begin, end, {uniform(code)});
  }
}

}  // namespace qkern
