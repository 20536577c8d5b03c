// SPDX-License-Identifier: Apache-2.0
#include "launch.cuh"

namespace qkern {
namespace cuda {

qk_status linear_lut2a16_bf16_sm80(const LinearParams& p, const Schedule& s, int32_t device,
                                   cudaStream_t stream) {
  return launch<Table<BF16, 2, Tables::kRows>>(p, s, device, stream);
}

}  // namespace cuda
}  // namespace qkern
