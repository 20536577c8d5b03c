// SPDX-License-Identifier: Apache-2.0
// From a converter to a function that launches it: what a file of instantiations contains.
#pragma once

#include <atomic>
#include <type_traits>

#include "host.h"
#include "linear.cuh"

namespace qkern {
namespace cuda {

// Shared memory of a launch, or the status of the launch.
using Launch = qk_status (*)(const LinearParams& p, const Schedule& s, int32_t device,
                             cudaStream_t stream);

template <class C, int kShape>
qk_status launch_shape(const LinearParams& p, const Schedule& s, int32_t device,
                       cudaStream_t stream) {
  using D = Chassis<C, kShape>;
  const int bytes = D::shared_bytes(p);
  // More than 48 KB is granted once per kernel and device; not an operation of the stream.
  static std::atomic<uint64_t> granted{0};
  const uint64_t bit = device < 64 ? (uint64_t)1 << device : 0;
  if (!(granted.load(std::memory_order_relaxed) & bit)) {
    const cudaError_t error = cudaFuncSetAttribute(
        linear_kernel<C, kShape>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit);
    if (error != cudaSuccess) return runtime_status(error, "qk_cuda_linear: shared memory");
    granted.fetch_or(bit, std::memory_order_relaxed);
  }
  const dim3 grid((unsigned)(s.row_groups * s.token_tiles), (unsigned)s.split);
  linear_kernel<C, kShape><<<grid, D::kS.threads(), bytes, stream>>>(p);
  return launched("qk_cuda_linear");
}

template <class C>
qk_status launch(const LinearParams& p, const Schedule& s, int32_t device, cudaStream_t stream) {
  switch (s.shape) {
    case 0:
      return launch_shape<C, 0>(p, s, device, stream);
    case 1:
      return launch_shape<C, 1>(p, s, device, stream);
    case 2:
      return launch_shape<C, 2>(p, s, device, stream);
    default:
      return launch_shape<C, 3>(p, s, device, stream);
  }
}

}  // namespace cuda
}  // namespace qkern
