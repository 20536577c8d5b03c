// SPDX-License-Identifier: Apache-2.0
// Addresses as Python passes them, and a weight made of such.
#pragma once

#include <cstdint>

#include "qkern/qkern.h"

namespace qkern::python {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// One weight in canonical storage; keeps no reference to the arrays.
struct Weight {
  qk_weight w = {};
};

inline Weight make_weight(int kind, int bits, int activations, int64_t n, int64_t k, int64_t group,
                          Address codes, int64_t codes_stride, Address scales, int scale_dtype,
                          int64_t scales_stride, Address zeros, int zero_dtype,
                          int64_t zeros_stride, Address codebook, int table_per, float table_scale,
                          Address perm) {
  Weight weight;
  qk_weight& w = weight.w;
  w.struct_size = sizeof w;
  w.kind = kind;
  w.bits = bits;
  w.activations = activations;
  w.n = n;
  w.k = k;
  w.group = group;
  w.codes = at<const uint8_t>(codes);
  w.codes_stride_bytes = codes_stride;
  w.scales = at<const void>(scales);
  w.scale_dtype = scale_dtype;
  w.scales_stride = scales_stride;
  w.zeros = at<const void>(zeros);
  w.zero_dtype = zero_dtype;
  w.zeros_stride = zeros_stride;
  w.codebook = at<const float>(codebook);
  w.table_per = table_per;
  w.table_scale = table_scale;
  w.perm = at<const int32_t>(perm);
  return weight;
}

}  // namespace qkern::python
