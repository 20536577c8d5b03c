// SPDX-License-Identifier: Apache-2.0
// Failures of the C interface: a status and a sentence, kept per thread.
#pragma once

#include "qkern/qkern.h"

namespace qkern {

// Stores the printf-formatted sentence for qk_last_error and returns `status`.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
qk_status fail(qk_status status, const char* format, ...);

}  // namespace qkern
