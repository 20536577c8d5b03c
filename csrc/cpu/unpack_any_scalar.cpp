// SPDX-License-Identifier: Apache-2.0
// Codes of the packed layout, one byte each, without vector instructions.

#include "kernels.h"

namespace qkern {

void unpack_any_scalar(const Packed& w, const uint8_t* group_codes, int half, int halves,
                       int64_t k0, int64_t columns, uint8_t* out, int64_t out_stride) {
  packed_codes(w, group_codes, half, halves, k0, columns, out, out_stride);
}

}  // namespace qkern
