// SPDX-License-Identifier: Apache-2.0
// Bit and number helpers that mean the same on host and device. The device side is one instruction
// each; the host side emulates it, so that everything built on them is tested without a GPU.
#pragma once

#include "../cpu/numeric.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define QK_HD __host__ __device__ __forceinline__
#else
#define QK_HD inline
#endif

namespace qkern {
namespace cuda {

struct alignas(16) Vector {  // what one lane reads at a time
  uint32_t word[4];
};

// prmt.b32: byte i of the result is byte (selector >> 4i & 7) of the eight bytes b:a, or that
// byte's sign in every bit where bit 3 of the nibble is set.
QK_HD uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
#else
  const uint64_t bytes = (uint64_t)b << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15u;
    uint32_t byte = (uint32_t)(bytes >> (8 * (nibble & 7u))) & 255u;
    if (nibble & 8u) byte = byte & 128u ? 255u : 0u;
    d |= byte << (8 * i);
  }
  return d;
#endif
}

// lop3.b32: any function of three bits, by its table. The compiler joins two operations with
// constants only where one of them is in a register, which it does not arrange by itself.
template <int kTable>
QK_HD uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
#else
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i)
    if (kTable >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return d;
#endif
}
QK_HD uint32_t and_or(uint32_t x, uint32_t mask, uint32_t base) {
  return lop3<0xea>(x, mask, base);
}
QK_HD uint32_t and_xor(uint32_t x, uint32_t mask, uint32_t base) {
  return lop3<0x6a>(x, mask, base);
}

// x >> kBits as the upper half of a product. The lanes of shifts, logic and byte permutes are what
// converters run short of; integer multiply-adds run beside them, on the lanes of float32 (Nsight
// Compute's manual lists them so; measured on an A100 by Abdelkhalik et al., arXiv 2208.11174).
// Shifts to the left the compiler makes products by itself.
template <int kBits>
QK_HD uint32_t shift_right(uint32_t x) {
  static_assert(kBits > 0 && kBits < 32);
#if defined(__CUDA_ARCH__)
  asm("mul.hi.u32 %0, %0, %1;" : "+r"(x) : "n"(1u << (32 - kBits)));
  return x;
#else
  return (uint32_t)(((uint64_t)x << (32 - kBits)) >> 32);
#endif
}

// Products and differences that may not be contracted into a fused multiply-add.
QK_HD float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
QK_HD float sub_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}
QK_HD float div_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
QK_HD float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }

QK_HD uint32_t float_as_bits(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  return float_bits(f);
#endif
}
QK_HD float bits_as_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  return bits_float(u);
#endif
}

// A product and an addition in each half of the words.
template <class T>
uint32_t fma2_on_host(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 32; i += 16)
    d |= (uint32_t)T::from_float(fmaf(T::to_float((uint16_t)(a >> i)),
                                      T::to_float((uint16_t)(b >> i)),
                                      T::to_float((uint16_t)(c >> i))))
         << i;
  return d;
}

// The two types of activations that the matrix units take, as bit patterns.
struct F16 {
  static constexpr qk_dtype kDtype = QK_F16;
  static constexpr uint32_t kOnes = 0x3c003c00u;
  QK_HD static float to_float(uint16_t h) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(h));
#else
    return f16_to_float(h);
#endif
  }
  QK_HD static uint16_t from_float(float f) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(f));
#else
    return float_to_f16(f);
#endif
  }
  // fma.rn.f16x2
  QK_HD static uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    return fma2_on_host<F16>(a, b, c);
#endif
  }
};

struct BF16 {
  static constexpr qk_dtype kDtype = QK_BF16;
  static constexpr uint32_t kOnes = 0x3f803f80u;
  QK_HD static float to_float(uint16_t h) { return bits_as_float((uint32_t)h << 16); }
  QK_HD static uint16_t from_float(float f) {
#if defined(__CUDA_ARCH__)
    return __bfloat16_as_ushort(__float2bfloat16_rn(f));
#else
    return float_to_bf16(f);
#endif
  }
  // fma.rn.bf16x2
  QK_HD static uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    return fma2_on_host<BF16>(a, b, c);
#endif
  }
};

struct S8 {
  static constexpr uint32_t kOnes = 0x01010101u;
};

QK_HD float half_to_float(uint16_t h, qk_dtype dtype) {
  return dtype == QK_F16 ? F16::to_float(h) : BF16::to_float(h);
}

// Element i of an array of F32, F16 or BF16.
QK_HD float load_number(const void* data, qk_dtype dtype, int64_t i) {
  return dtype == QK_F32 ? ((const float*)data)[i]
                         : half_to_float(((const uint16_t*)data)[i], dtype);
}
QK_HD void store_number(void* data, qk_dtype dtype, int64_t i, float value) {
  if (dtype == QK_F32)
    ((float*)data)[i] = value;
  else
    ((uint16_t*)data)[i] = dtype == QK_F16 ? F16::from_float(value) : BF16::from_float(value);
}

}  // namespace cuda
}  // namespace qkern
