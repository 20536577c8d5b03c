// SPDX-License-Identifier: Apache-2.0
// From a converter to a function that launches it: what a file of instantiations contains.
#pragma once

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
  static SharedGrant granted;
  if (qk_status status =
          granted.request((const void*)linear_kernel<C, kShape>, device, "qk_cuda_linear"))
    return status;
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
