// SPDX-License-Identifier: Apache-2.0
// One row of canonical storage to floats, any format, 8 columns at a time.
//
// Eight codes of b bits lie in at most b + 1 bytes: a tbl gives each word the two bytes that hold
// its code, a shift by lane brings it down. 8b bits are whole bytes, so one pair of table and shift
// serves a whole group.
//
// Numbers: Int: scale * (code - zero), two roundings; table: (scale * table_scale) * entry.
//
// Run under emulation only.

#include "kernels.h"
#include "simd/codes_neon.h"

namespace qkern {
namespace {

struct Eight {
  float32x4_t low, high;
};

// How 8 codes that start `first_bit` (0..7) bits into a byte reach their words.
struct Spread {
  uint8x16_t bytes;
  int16x8_t shifts;
  uint16x8_t mask;

  Spread(int bits, int first_bit) {
    const uint16x8_t lane = {0, 1, 2, 3, 4, 5, 6, 7};
    const uint16x8_t bit = vmlaq_n_u16(vdupq_n_u16((uint16_t)first_bit), lane, (uint16_t)bits);
    const uint16x8_t byte = vshrq_n_u16(bit, 3);
    bytes = vreinterpretq_u8_u16(vorrq_u16(byte, vshlq_n_u16(vaddq_u16(byte, vdupq_n_u16(1)), 8)));
    shifts = vnegq_s16(vreinterpretq_s16_u16(vandq_u16(bit, vdupq_n_u16(7))));
    mask = vdupq_n_u16((uint16_t)((1 << bits) - 1));
  }
  uint16x8_t codes(uint8x16_t stream) const {
    return vandq_u16(vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(stream, bytes)), shifts), mask);
  }
};

struct Uniform {
  float32x4_t scale, zero;

  float32x4_t value(uint32x4_t codes) const {
    return vmulq_f32(scale, vsubq_f32(vcvtq_f32_u32(codes), zero));
  }
  Eight operator()(uint16x8_t codes) const {
    return {value(vmovl_u16(vget_low_u16(codes))), value(vmovl_high_u16(codes))};
  }
};

struct SixteenEntries {
  float entry[16];

  SixteenEntries(const float* table, int entries) {
    for (int i = 0; i < 16; ++i) entry[i] = table[i & (entries - 1)];
  }
};

// Tables of up to 16 entries, as planes of bytes.
struct SmallTable {
  float32x4_t scale;
  BytePlanes<4> planes;

  SmallTable(float factor, const float* table, int entries)
      : scale(vdupq_n_f32(factor)), planes(SixteenEntries(table, entries).entry) {}

  Eight operator()(uint16x8_t codes) const {
    float32x4_t values[4];
    planes.look_up(vcombine_u8(vmovn_u16(codes), vdup_n_u8(0)), values);
    return {vmulq_f32(scale, values[0]), vmulq_f32(scale, values[1])};
  }
};

struct LargeTable {
  float32x4_t scale;
  const float* entries;

  Eight operator()(uint16x8_t codes) const {
    uint16_t index[8];
    float values[8];
    vst1q_u16(index, codes);
    for (int i = 0; i < 8; ++i) values[i] = entries[index[i]];
    return {vmulq_f32(scale, vld1q_f32(values)), vmulq_f32(scale, vld1q_f32(values + 4))};
  }
};

template <qk_dtype OUT>
void store_eight(void* out, int64_t k, int64_t count, Eight v) {
  if (count >= 8) {
    store_f32x4(out, OUT, k, v.low);
    store_f32x4(out, OUT, k + 4, v.high);
    return;
  }
  store_some_f32x4(out, OUT, k, min64(count, 4), v.low);
  if (count > 4) store_some_f32x4(out, OUT, k + 4, count - 4, v.high);
}

// Columns [begin, end), which share scale, zero and table.
template <qk_dtype OUT, class Value>
void write_columns(const DequantizeRow& row, int64_t begin, int64_t end, const Value& value) {
  const int64_t first_bit = begin * row.stream_bits, step = row.stream_bits;
  const uint8_t* stream = row.codes + (first_bit >> 3);
  const uint8_t* stream_end = row.codes + ceil_div(row.k * row.stream_bits, 8);
  const Spread spread(row.stream_bits, (int)(first_bit & 7));
  void* const out = row.out;
  int64_t k = begin;
  for (; k + 8 <= end && stream_end - stream >= 16; k += 8, stream += step)
    store_eight<OUT>(out, k, 8, value(spread.codes(vld1q_u8(stream))));
  for (; k < end; k += 8, stream += step) {
    uint8_t bytes[16] = {0};
    memcpy(bytes, stream, (size_t)min64(16, stream_end - stream));
    store_eight<OUT>(out, k, end - k, value(spread.codes(vld1q_u8(bytes))));
  }
}

template <class Value>
void write_group(const DequantizeRow& row, int64_t begin, int64_t end, const Value& value) {
  if (row.out_dtype == QK_F32)
    write_columns<QK_F32>(row, begin, end, value);
  else if (row.out_dtype == QK_F16)
    write_columns<QK_F16>(row, begin, end, value);
  else
    write_columns<QK_BF16>(row, begin, end, value);
}

}  // namespace

void dequantize_any_neon(const DequantizeRow& row) {
  const int entries = 1 << row.bits;
  for (int64_t g = 0; g * row.group < row.k; ++g) {
    const int64_t begin = g * row.group, end = min64(row.k, begin + row.group);
    const float scale = row.scales ? load_float(row.scales, row.scale_dtype, g) : 1.f;
    if (!row.table) {
      const float zero =
          row.zeros ? load_float(row.zeros, row.zero_dtype, g) : (float)(entries / 2);
      write_group(row, begin, end, Uniform{vdupq_n_f32(scale), vdupq_n_f32(zero)});
      continue;
    }
    const float* table = row.table + g * row.table_group_stride;
    const float factor = scale * row.table_scale;
    if (row.bits <= 4)
      write_group(row, begin, end, SmallTable(factor, table, entries));
    else
      write_group(row, begin, end, LargeTable{vdupq_n_f32(factor), table});
  }
}

}  // namespace qkern
