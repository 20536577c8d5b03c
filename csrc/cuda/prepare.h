// SPDX-License-Identifier: Apache-2.0
// Launches that bring activations into the form a linear kernel reads.
#pragma once

#include <cuda_runtime_api.h>

#include "activations.cuh"

namespace qkern {
namespace cuda {

// q[m, columns] and scales[m, ceil(k / group)]. With one group per row the columns may be gathered
// (columns = layout.k_padded, padding is 0); with several, `group` columns of the input in weight
// order make a group.
void quantize_rows(const Activations& x, int64_t group, const Gather& gather, int64_t columns,
                   int8_t* q, int64_t q_row_stride, float* scales, cudaStream_t stream);

// 16-bit activations into dense padded rows of k_padded.
void gather_rows(const Activations& x, const Gather& gather, void* out, cudaStream_t stream);

// The tiles of a mixture of experts.
void list_tiles(const int64_t* offsets, int64_t experts, int64_t m, int tokens, int64_t count,
                ExpertTile* tiles, cudaStream_t stream);

}  // namespace cuda
}  // namespace qkern
