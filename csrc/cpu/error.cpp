// SPDX-License-Identifier: Apache-2.0
#include "error.h"

#include <cstdarg>
#include <cstdio>

namespace qkern {
namespace {
thread_local char last_error[512] = "";
}

qk_status fail(qk_status status, const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(last_error, sizeof last_error, format, args);
  va_end(args);
  return status;
}

}  // namespace qkern

extern "C" {
const char* qk_last_error(void) { return qkern::last_error; }
int32_t qk_abi_version(void) { return QK_ABI_VERSION; }
const char* qk_version(void) { return QKERN_VERSION; }
}
