// SPDX-License-Identifier: Apache-2.0
// What the processor can do and the operating system saves across a task switch.
#pragma once

#include "qkern/qkern.h"

namespace qkern {

// Best level of qk_isa; levels of one family include all below them.
qk_isa detect_isa();

}  // namespace qkern
