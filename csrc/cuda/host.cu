// SPDX-License-Identifier: Apache-2.0
#include "host.h"

#include <stdarg.h>
#include <stdio.h>

namespace qkern {
namespace cuda {

static thread_local char last_error[512] = "";

qk_status fail(qk_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

qk_status runtime_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return QK_OK;
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    return fail(QK_UNSUPPORTED,
                "%s: this build has no code for the device; rebuild with its architecture in "
                "QKERN_CUDA_ARCHITECTURES (8.0 is the oldest that works)",
                what);
  return fail(error == cudaErrorMemoryAllocation ? QK_OUT_OF_MEMORY : QK_INVALID_ARGUMENT,
              "%s: the CUDA runtime says: %s", what, cudaGetErrorString(error));
}

qk_status launched(const char* what) { return runtime_status(cudaGetLastError(), what); }

qk_status open_packed(const char* what, const qk_weight* weight, const void* packed, int64_t bytes,
                      Layout* layout) {
  if (!weight || weight->struct_size < sizeof(qk_weight))
    return fail(QK_INVALID_ARGUMENT, "%s: qk_weight.struct_size must be at least %zu", what,
                sizeof(qk_weight));
  if (const char* reason = make_layout(*weight, layout))
    return fail(QK_UNSUPPORTED, "%s: %s", what, reason);
  if (!packed || (uintptr_t)packed % 128)
    return fail(QK_INVALID_ARGUMENT, "%s: the packed weight must be aligned to 128 bytes", what);
  if (bytes < layout->total_bytes)
    return fail(QK_INVALID_ARGUMENT,
                "%s: the packed weight needs %lld bytes in layout version %d, got %lld; pack it "
                "again",
                what, (long long)layout->total_bytes, QK_CUDA_LAYOUT_VERSION, (long long)bytes);
  return QK_OK;
}

}  // namespace cuda
}  // namespace qkern

extern "C" int32_t qk_cuda_abi_version(void) { return QK_CUDA_ABI_VERSION; }
extern "C" int32_t qk_cuda_layout_version(void) { return QK_CUDA_LAYOUT_VERSION; }
extern "C" const char* qk_cuda_last_error(void) { return qkern::cuda::last_error; }
