/* SPDX-License-Identifier: Apache-2.0
 *
 * qkern: the C interface of the CUDA library (libqkern_cuda). It shares the types of qkern.h.
 *
 * Conventions
 *   - Data pointers are device addresses on `device`; structs and `const char*` are the host's.
 *   - Every operation is put on `stream` (a cudaStream_t of that device; NULL: the default stream)
 *     and returns at once. Nothing allocates, synchronizes, reads device memory on the host or
 *     depends on values in it, so every call can be captured in a CUDA graph, the first one too.
 *   - The device that was current before a call is current after it.
 *   - A weight is described by a qk_weight. Where a packed weight is described, its pointers only
 *     say which parts exist (non-NULL) and are not followed.
 *   - What the host can check is checked and answered with a status and a sentence. What only the
 *     device can see never leads to an access out of bounds: a row out of range gives NaN, and so
 *     does a perm index in qk_cuda_linear (0 with int8 activations); qk_cuda_dequantize leaves the
 *     column of such an index as it was.
 */
#ifndef QKERN_QKERN_CUDA_H
#define QKERN_QKERN_CUDA_H

#include "qkern.h"

#ifdef __cplusplus
extern "C" {
#endif

#define QK_CUDA_ABI_VERSION 1
#define QK_CUDA_LAYOUT_VERSION 3 /* of the packed bytes: csrc/cuda/layout.cuh */

QK_API int32_t qk_cuda_abi_version(void);
QK_API int32_t qk_cuda_layout_version(void);
QK_API const char* qk_cuda_last_error(void); /* of the calling thread's last failure */

/* ---- Packed weights: one layout for every M ------------------------------------------------ */

QK_API qk_status qk_cuda_packed_bytes(const qk_weight* weight, int64_t* bytes);
/* `packed` is aligned to 128 bytes. */
QK_API qk_status qk_cuda_pack(const qk_weight* weight, void* packed, int64_t bytes, int32_t device,
                              void* stream);
/* Back to canonical storage, bit for bit, into dense arrays; NULL pointers are skipped. */
QK_API qk_status qk_cuda_unpack(const qk_weight* weight, const void* packed, int64_t bytes,
                                const qk_weight_out* out, int32_t device, void* stream);

/* ---- Operations ---------------------------------------------------------------------------- */

/* y[M, N] = x[M, K] . W^T + bias. Weights with float activations take x in F16 or BF16; weights
 * with int8 activations take F32 too. Two calls with the same inputs give the same bits, and a row
 * of y has the same bits in every batch of the same family: M <= 64, 65..256, above. */
typedef struct qk_cuda_linear_args {
  uint32_t struct_size;
  int32_t device;
  void* stream;
  const qk_weight* weight;
  const void* packed;
  int64_t packed_bytes;
  qk_dtype x_dtype;
  const void* x;
  int64_t m;
  int64_t x_row_stride, x_col_stride; /* any sign */
  qk_dtype bias_dtype;                /* F32, F16, BF16 */
  const void* bias;                   /* [n] or NULL */
  qk_dtype y_dtype;                   /* F32, F16, BF16 */
  void* y;
  int64_t y_row_stride; /* columns of y are dense */
  void* workspace;      /* qk_cuda_linear_workspace bytes, aligned to 128; contents arbitrary */
  int64_t workspace_bytes;
} qk_cuda_linear_args;

/* QK_UNSUPPORTED and the reason where no kernel multiplies this weight with such activations. Asks
 * no device. */
QK_API qk_status qk_cuda_linear_supported(const qk_weight* weight, qk_dtype x_dtype);
/* Looks at the alignment of x, at no other address, and at the size of the device. */
QK_API qk_status qk_cuda_linear_workspace(const qk_cuda_linear_args* args, int64_t* bytes);
QK_API qk_status qk_cuda_linear(const qk_cuda_linear_args* args);
QK_API const char* qk_cuda_last_kernel(void); /* which row the calling thread's last linear ran */

/* Mixture of experts: rows offsets[e] .. offsets[e + 1] of x times the transposed weight of expert
 * e, plus row e of bias [experts, n]. The offsets are read on the device alone, so the grid is an
 * upper bound and graphs replay with other offsets. Rows of y that belong to no expert stay as they
 * were. Two calls with the same inputs give the same bits, and a row of y has the same bits in
 * every batch of the same family: at most 64 rows in all, at most 64 per expert on average, above.
 * They can differ from qk_cuda_linear in the order of sums. */
typedef struct qk_cuda_grouped_linear_args {
  uint32_t struct_size;
  qk_cuda_linear_args linear; /* weight: one of them; packed: all, qk_cuda_packed_bytes each */
  int64_t experts;
  const int64_t* offsets;    /* [experts + 1], ascending from 0 to m; on the device */
  const float* table_scales; /* [experts] in the place of weight->table_scale, or NULL; device */
} qk_cuda_grouped_linear_args;

QK_API qk_status qk_cuda_grouped_linear_workspace(const qk_cuda_grouped_linear_args* args,
                                                  int64_t* bytes);
QK_API qk_status qk_cuda_grouped_linear(const qk_cuda_grouped_linear_args* args);

/* dx[M, K] = dy[M, N] . W, the gradient of the product to its input: W as qk_cuda_dequantize gives
 * it in `dtype`, the type of dy and dx (F16 or BF16); with int8 activations too. A row of dx has
 * the same bits in every batch. Columns that belong to a perm index out of range stay as they were.
 */
typedef struct qk_cuda_grad_args {
  uint32_t struct_size;
  int32_t device;
  void* stream;
  const qk_weight* weight;
  const void* packed;
  int64_t packed_bytes;
  qk_dtype dtype;
  const void* dy;
  int64_t m;
  int64_t dy_row_stride, dy_col_stride; /* any sign */
  void* dx;
  int64_t dx_row_stride; /* columns of dx are dense */
  void* workspace;       /* qk_cuda_linear_grad_workspace bytes, aligned to 128 */
  int64_t workspace_bytes;
} qk_cuda_grad_args;

/* Looks at the alignment of dy and at no device. */
QK_API qk_status qk_cuda_linear_grad_workspace(const qk_cuda_grad_args* args, int64_t* bytes);
QK_API qk_status qk_cuda_linear_grad_input(const qk_cuda_grad_args* args);

/* out[i, :] = row rows[i] (or row_begin + i where rows is NULL) of W, columns in input order.
 * Serves dequantize and embedding. */
typedef struct qk_cuda_dequantize_args {
  uint32_t struct_size;
  int32_t device;
  void* stream;
  const qk_weight* weight;
  const void* packed;
  int64_t packed_bytes;
  const int64_t* rows;
  int64_t row_begin, row_count;
  qk_dtype out_dtype; /* F32, F16, BF16 */
  void* out;
  int64_t out_row_stride;
} qk_cuda_dequantize_args;

QK_API qk_status qk_cuda_dequantize(const qk_cuda_dequantize_args* args);

/* The rule of qk_quantize_activations, bit for bit. */
typedef struct qk_cuda_quantize_args {
  uint32_t struct_size;
  int32_t device;
  void* stream;
  qk_dtype x_dtype; /* F32, F16, BF16 */
  const void* x;
  int64_t m, k, group; /* group 0: the whole row */
  int64_t x_row_stride, x_col_stride;
  int8_t* q;
  int64_t q_row_stride;
  float* scales; /* [m, G] dense */
} qk_cuda_quantize_args;

QK_API qk_status qk_cuda_quantize_activations(const qk_cuda_quantize_args* args);

/* ---- The registry -------------------------------------------------------------------------- */

typedef struct qk_cuda_kernel_info {
  uint32_t struct_size;
  const char* name;    /* "linear_w4a16_f16_sm80" */
  const char* weights; /* "integers", "tables", "integers or tables" */
  int32_t bits;
  qk_table_per table_per;  /* the finest table it reads */
  const char* activations; /* "float16", "bfloat16", "int8, int8_group" */
} qk_cuda_kernel_info;

QK_API int32_t qk_cuda_kernel_count(void);
QK_API qk_status qk_cuda_kernel_at(int32_t index, qk_cuda_kernel_info* info);

#ifdef __cplusplus
}
#endif

#endif
