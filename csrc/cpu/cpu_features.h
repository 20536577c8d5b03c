// SPDX-License-Identifier: Apache-2.0
// What the processor can do and the operating system saves across a task switch.
#pragma once

#include "qkern/qkern.h"

namespace qkern {

// Best level of qk_isa; levels of one family include all below them.
qk_isa detect_isa();

// Whether shifts and permutes of 512 bits run only where multiplications do (Intel: ports 0 and 5).
// Kernels decide by it how they spend their time, never what they return.
bool decoding_takes_multiply_ports();

}  // namespace qkern
