// SPDX-License-Identifier: Apache-2.0
// Activations ready for the linear kernels: int8 codes, or float32 in packed column order, a block
// of rows at a time. Shared by every driver (linear, conv, grouped); where a row comes from is
// theirs.
#pragma once

#include "kernels.h"

namespace qkern {

// How a block of ready rows lies in scratch. Follows from the weight alone, so that a row is the
// same bits whatever block it is in.
struct RowLayout {
  const KernelRow* quantize;
  const KernelRow* convert;
  bool int8;
  bool sums;     // x_sum is needed
  int64_t rows;  // that the block has room for
  int64_t chunk, chunks_per_group, chunks, scales;
  int64_t row_stride;                            // elements of a ready row
  int64_t rows_at, scales_at, init_at, sums_at;  // bytes from the start of the block
  int64_t bytes;                                 // a multiple of 64
};

// `stored`: ready rows are kept; else (float32 used where it lies) only their sums.
RowLayout row_layout(const Packed& w, int64_t rows, bool stored);

// One dense row in the order of packed columns (perm applied) to place r of the block.
void prepare_row(const RowLayout& l, const Packed& w, const void* dense, qk_dtype dtype,
                 uint8_t* block, int64_t r);
// The sums of a float row that is used where it lies.
void sum_row(const RowLayout& l, const Packed& w, const float* x, uint8_t* block, int64_t r);

// The inputs of a job over rows [first, first + rows) of the block. Bias and output are left open.
LinearJob job_of(const RowLayout& l, const Packed& w, const uint8_t* block, int64_t first,
                 int64_t rows);

bool is_float(qk_dtype d);

// Kernels read a float32 bias where it lies, if it lies as a float does; else a copy.
bool copies_bias(const void* bias, qk_dtype dtype);
// `bias` as float32: where it lies, or converted to `to` [n].
const float* float_bias(const void* bias, qk_dtype dtype, int64_t n, float* to);

// Copies `count` elements, `step` elements apart, to dense ones; `order` (or NULL) says which.
void gather_elements(const uint8_t* from, int64_t step, const int32_t* order, int64_t count,
                     int size, uint8_t* dense);

// The caller's workspace, or (where it brings none) scratch that the library keeps for the thread.
// NULL with a failure in *status.
uint8_t* workspace_of(const char* op, void* given, int64_t given_bytes, int64_t needed,
                      qk_status* status);

}  // namespace qkern
