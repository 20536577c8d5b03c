// SPDX-License-Identifier: Apache-2.0
// What every entry point needs on the host: failures, the device guard, checks of a launch.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

#include "schedule.h"

namespace qkern {
namespace cuda {

// Stores the sentence for qk_cuda_last_error and returns `status`.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
qk_status fail(qk_status status, const char* format, ...);

// The status and sentence of an error of the runtime.
qk_status runtime_status(cudaError_t error, const char* what);

// Makes `device` current and puts the previous one back. An entry point starts with one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      switched_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (switched_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_ = cudaSuccess;
  int previous_ = 0;
  bool switched_ = false;
};

// More than 48 KB of shared memory is granted once per kernel and device; not an operation of the
// stream. One static object per kernel.
class SharedGrant {
 public:
  qk_status request(const void* kernel, int32_t device, const char* what) {
    const uint64_t bit = device < 64 ? (uint64_t)1 << device : 0;
    if (granted_.load(std::memory_order_relaxed) & bit) return QK_OK;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit);
    if (error == cudaSuccess) granted_.fetch_or(bit, std::memory_order_relaxed);
    return runtime_status(error, what);
  }

 private:
  std::atomic<uint64_t> granted_{0};
};

// The status of what the runtime says about the last launch of `what`.
qk_status launched(const char* what);

// Describes a packed weight and checks that the block can be one.
qk_status open_packed(const char* what, const qk_weight* weight, const void* packed, int64_t bytes,
                      Layout* layout);

inline bool is_float_type(qk_dtype dtype) {
  return dtype == QK_F32 || dtype == QK_F16 || dtype == QK_BF16;
}

}  // namespace cuda
}  // namespace qkern
