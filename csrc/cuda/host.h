// SPDX-License-Identifier: Apache-2.0
// What every entry point needs on the host: failures, the device guard, checks of a launch.
#pragma once

#include <cuda_runtime_api.h>

#include "layout.cuh"

namespace qkern {
namespace cuda {

// Stores the sentence for qk_cuda_last_error and returns `status`.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
qk_status fail(qk_status status, const char* format, ...);

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

// The status of what the runtime says about the last launch of `what`.
qk_status launched(const char* what);
qk_status runtime_status(cudaError_t error, const char* what);

// Describes a packed weight and checks that the block can be one.
qk_status open_packed(const char* what, const qk_weight* weight, const void* packed, int64_t bytes,
                      Layout* layout);

inline bool is_float_type(qk_dtype dtype) {
  return dtype == QK_F32 || dtype == QK_F16 || dtype == QK_BF16;
}

}  // namespace cuda
}  // namespace qkern
