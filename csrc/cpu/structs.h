// SPDX-License-Identifier: Apache-2.0
// Structs of the C interface across versions: what callers built with an older or newer qkern.h
// hand over. A struct only ever grows at its end, and a new field's zero means what was before.
#pragma once

#include <cstring>

#include "error.h"

namespace qkern {

// Size that a struct had when it first appeared in a release, on 64-bit machines.
template <class Struct>
constexpr uint32_t first_size();
#define QKERN_FIRST_SIZE(type, bytes)     \
  template <>                             \
  constexpr uint32_t first_size<type>() { \
    return bytes;                         \
  }                                       \
  static_assert(sizeof(type) >= bytes, "a struct of the interface has shrunk");
QKERN_FIRST_SIZE(qk_parallel, 32)
QKERN_FIRST_SIZE(qk_weight, 128)
QKERN_FIRST_SIZE(qk_weight_out, 48)
QKERN_FIRST_SIZE(qk_linear_args, 120)
QKERN_FIRST_SIZE(qk_conv_args, 272)
QKERN_FIRST_SIZE(qk_grouped_linear_args, 136)
QKERN_FIRST_SIZE(qk_dequantize_args, 88)
QKERN_FIRST_SIZE(qk_quantize_args, 96)
QKERN_FIRST_SIZE(qk_int8_matmul_args, 112)
QKERN_FIRST_SIZE(qk_fit_rtn_args, 96)
QKERN_FIRST_SIZE(qk_fit_table_args, 96)
QKERN_FIRST_SIZE(qk_fit_kmeans_args, 112)
QKERN_FIRST_SIZE(qk_fit_tiles_args, 96)
QKERN_FIRST_SIZE(qk_kernel_info, 48)
#undef QKERN_FIRST_SIZE

template <class Struct>
qk_status check_struct(const char* name, const Struct* given) {
  if (!given) return fail(QK_INVALID_ARGUMENT, "%s must not be NULL", name);
  if (given->struct_size < first_size<Struct>())
    return fail(QK_INVALID_ARGUMENT, "%s: struct_size must be at least %u, got %u", name,
                first_size<Struct>(), given->struct_size);
  if (given->struct_size > sizeof(Struct))
    return fail(QK_UNSUPPORTED,
                "%s: struct_size is %u, but this library knows %zu bytes: the caller was built "
                "with a newer qkern.h",
                name, given->struct_size, sizeof(Struct));
  return QK_OK;
}

// The struct as this library knows it; what the caller does not know is zero.
template <class Struct>
qk_status read_struct(const char* name, const Struct* given, Struct* known) {
  if (qk_status s = check_struct(name, given)) return s;
  *known = {};
  std::memcpy(static_cast<void*>(known), given, given->struct_size);
  return QK_OK;
}

// Fills the part of `result` that the caller knows; its struct_size has been checked.
template <class Struct>
void write_struct(const Struct& known, Struct* result) {
  const uint32_t size = result->struct_size;
  std::memcpy(static_cast<void*>(result), &known, size);
  result->struct_size = size;
}

}  // namespace qkern
