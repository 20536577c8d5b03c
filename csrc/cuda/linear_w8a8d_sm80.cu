// SPDX-License-Identifier: Apache-2.0
#include "launch.cuh"

namespace qkern {
namespace cuda {

qk_status linear_w8a8d_sm80(const LinearParams& p, const Schedule& s, int32_t device,
                            cudaStream_t stream) {
  return launch<Bytes8>(p, s, device, stream);
}

}  // namespace cuda
}  // namespace qkern
