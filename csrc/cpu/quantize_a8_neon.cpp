// SPDX-License-Identifier: Apache-2.0
// Dynamic quantization of one row of activations, 16 at a time.
//
// Numbers: as quantize_a8_scalar. The largest magnitude is found among the bits of |x|, which order
// as the values do and put infinity and NaN on top; fcvtns rounds half to even.
//
// Run under emulation only.

#include "kernels.h"
#include "simd/rows_neon.h"

namespace qkern {
namespace {

inline uint32x4_t magnitude_bits(float32x4_t v) { return vreinterpretq_u32_f32(vabsq_f32(v)); }

inline int16x4_t words_of(float32x4_t v, float factor) {
  return vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(v, factor)));
}

template <qk_dtype DTYPE>
uint32_t largest_magnitude(const void* x, int64_t begin, int64_t columns) {
  uint32x4_t largest[4];
  for (int i = 0; i < 4; ++i) largest[i] = vdupq_n_u32(0);
  int64_t k = 0;
  for (; k + 16 <= columns; k += 16)
    for (int i = 0; i < 4; ++i)
      largest[i] = vmaxq_u32(largest[i], magnitude_bits(load_f32x4(x, DTYPE, begin + k + 4 * i)));
  for (; k < columns; k += 4)
    largest[0] = vmaxq_u32(
        largest[0], magnitude_bits(load_some_f32x4(x, DTYPE, begin + k, min64(4, columns - k))));
  return vmaxvq_u32(
      vmaxq_u32(vmaxq_u32(largest[0], largest[1]), vmaxq_u32(largest[2], largest[3])));
}

template <qk_dtype DTYPE>
void write_codes(const void* x, int64_t begin, int64_t columns, float factor, int8_t* to) {
  int64_t k = 0;
  for (; k + 16 <= columns; k += 16) {
    int16x4_t words[4];
    for (int i = 0; i < 4; ++i)
      words[i] = words_of(load_f32x4(x, DTYPE, begin + k + 4 * i), factor);
    vst1q_s8(to + k, vqmovn_high_s16(vqmovn_s16(vcombine_s16(words[0], words[1])),
                                     vcombine_s16(words[2], words[3])));
  }
  for (; k < columns; k += 4) {
    const int64_t count = min64(4, columns - k);
    const int16x4_t words = words_of(load_some_f32x4(x, DTYPE, begin + k, count), factor);
    int8_t codes[8];
    vst1_s8(codes, vqmovn_s16(vcombine_s16(words, words)));
    memcpy(to + k, codes, (size_t)count);
  }
}

template <qk_dtype DTYPE>
void quantize_row(const void* x, int64_t k, int64_t group, int8_t* q, int64_t q_group_stride,
                  float* scales) {
  for (int64_t g = 0; g * group < k; ++g) {
    const int64_t begin = g * group, columns = min64(group, k - begin);
    const uint32_t bits = largest_magnitude<DTYPE>(x, begin, columns);
    const float largest = bits_float(bits);
    const bool finite = bits < 0x7f800000u;
    const bool usable = finite && largest >= 0x1p-100f;
    scales[g] = !finite ? NAN : usable ? largest / 127.f : 0.f;
    int8_t* to = q + g * q_group_stride;
    if (usable)
      write_codes<DTYPE>(x, begin, columns, 127.f / largest, to);
    else
      memset(to, 0, (size_t)columns);
  }
}

}  // namespace

void quantize_a8_neon(const void* x, qk_dtype dtype, int64_t k, int64_t group, int8_t* q,
                      int64_t q_group_stride, float* scales) {
  if (dtype == QK_F32)
    quantize_row<QK_F32>(x, k, group, q, q_group_stride, scales);
  else if (dtype == QK_F16)
    quantize_row<QK_F16>(x, k, group, q, q_group_stride, scales);
  else
    quantize_row<QK_BF16>(x, k, group, q, q_group_stride, scales);
}

}  // namespace qkern
