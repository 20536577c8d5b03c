/* SPDX-License-Identifier: Apache-2.0
 *
 * qkern: low-bit matrix kernels. The C interface of the CPU core.
 *
 * Conventions
 *   - Versions. Every struct begins with `struct_size`; the caller sets it to sizeof(the struct),
 *     and zeroes the rest before it fills what it needs. Structs only grow, at their end, and the
 *     zero of a new field means what was before. A library that is newer than the caller reads and
 *     writes only what the caller knows; an older one refuses (QK_UNSUPPORTED). Programs that open
 *     the library themselves compare qk_abi_version() with QK_ABI_VERSION first.
 *   - Ownership. Memory is the caller's. No function keeps a pointer after it returns, except
 *     qk_set_parallel, which copies the struct and keeps `context`. Texts that functions return
 *     belong to the library and live as long as it does; that of qk_last_error() lives until the
 *     next failure on the thread. Inputs are never written. Outputs must not overlap inputs.
 *   - Allocation. qk_linear allocates nothing where it is given a workspace; the others allocate
 *     scratch that they free before they return, or QK_OUT_OF_MEMORY.
 *   - Alignment. Packed weights and workspaces begin at a multiple of 64 bytes. Arrays of numbers
 *     begin at a multiple of their element's size; codes and strides may be anything.
 *   - Bounds. Nothing outside the described arrays is read or written, packed weights are checked
 *     against the bytes that the caller says they have, and gaps between rows stay as they are.
 *   - Strides are in elements unless the name says bytes. Sizes are 64-bit. Empty sizes (m = 0,
 *     no rows) are fine and do nothing; pointers may then be NULL.
 *   - Errors. Functions return a qk_status and never throw or abort. qk_last_error() is the
 *     sentence that belongs to the last failure on the calling thread. After a failure the outputs
 *     are as they were, unless the description says otherwise.
 *   - Threads. All functions may be called from several threads at once, on the same weights too.
 *     The qk_set_* functions change process-wide state; a call that is already running is not
 *     affected. The library's own threads are started by the first call that needs them, survive
 *     no fork (the child starts its own), and need no shutting down.
 *
 * Letters: M rows of activations, N outputs, K inputs, g group size along K, G = ceil(K / g),
 * b bits of a code.
 */
#ifndef QKERN_QKERN_H
#define QKERN_QKERN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#if defined(QKERN_BUILDING)
#define QK_API __declspec(dllexport)
#else
#define QK_API __declspec(dllimport)
#endif
#else
#define QK_API __attribute__((visibility("default")))
#endif

#define QK_ABI_VERSION 1

/* ---- Status ------------------------------------------------------------------------------- */

typedef int32_t qk_status;
enum {
  QK_OK = 0,
  QK_INVALID_ARGUMENT = 1, /* a pointer, size, stride or enum that makes no sense */
  QK_UNSUPPORTED = 2,      /* sensible, but no kernel here can do it */
  QK_BAD_FORMAT = 3,       /* the numbers of a weight break the rules of its format */
  QK_OUT_OF_MEMORY = 4
};

QK_API int32_t qk_abi_version(void);
QK_API const char* qk_version(void);    /* "0.1.0" */
QK_API const char* qk_last_error(void); /* valid until the next failing call of this thread */

/* ---- Types of numbers --------------------------------------------------------------------- */

typedef int32_t qk_dtype;
enum {
  QK_F32 = 0,
  QK_F16 = 1,
  QK_BF16 = 2,
  QK_U8 = 3,
  QK_I8 = 4,
  QK_I32 = 5,
  QK_E8M0 = 6, /* 2^(byte - 127), byte 255 is NaN (OCP MX 1.0) */
  QK_E4M3 = 7  /* float8 e4m3fn */
};

/* ---- Instruction sets --------------------------------------------------------------------- */

typedef int32_t qk_isa;
enum {
  QK_ISA_AUTO = -1,
  QK_ISA_SCALAR = 0,
  QK_ISA_AVX2 = 1,       /* avx2, fma, f16c */
  QK_ISA_AVX512 = 2,     /* avx512 f, bw, dq, vl, and all of AVX2 */
  QK_ISA_AVX512VNNI = 3, /* avx512_vnni, and all of AVX512 */
  QK_ISA_AVX512AMX = 4,  /* amx_tile, amx_int8, the system's leave to use them, AVX512VNNI */
  QK_ISA_NEON = 16,
  QK_ISA_NEONDOT = 17,
  QK_ISA_NEONI8MM = 18
};

QK_API qk_isa qk_detected_isa(void); /* best level that processor and operating system allow */
QK_API qk_isa qk_active_isa(void);   /* the level in force */
/* Caps the level. QK_ISA_AUTO lifts the cap; a level the machine lacks is QK_UNSUPPORTED. */
QK_API qk_status qk_set_isa(qk_isa isa);
QK_API const char* qk_isa_name(qk_isa isa); /* "avx512vnni"; NULL for an unknown number */

/* ---- Threads ------------------------------------------------------------------------------ */

typedef void (*qk_task)(void* arg, int64_t task);

/* How a call spreads its tasks. `run` must call fn(arg, t) exactly once for each t in [0, tasks),
 * in any order, on any threads, and return when all are done. `threads` says how many may run at
 * once; it is asked once per call. Results never depend on either. */
typedef struct qk_parallel {
  uint32_t struct_size;
  int32_t (*threads)(void* context);
  void (*run)(void* context, int64_t tasks, qk_task fn, void* arg);
  void* context;
} qk_parallel;

/* Process-wide choice; NULL is the library's own pool. Calls that are running when it changes
 * may use the old one to their end: its functions and context must outlast them. */
QK_API qk_status qk_set_parallel(const qk_parallel* parallel);
/* Runs on the OpenMP runtime whose entry points are given (GOMP_parallel and
 * omp_get_max_threads, as libgomp, libomp and libiomp5 export them), so that a host that already
 * has such a runtime, as torch has, keeps a single set of threads. */
QK_API qk_status qk_set_parallel_openmp(void* gomp_parallel, void* omp_get_max_threads);
/* Upper limit for every choice above; 0 lifts it. */
QK_API qk_status qk_set_threads(int32_t threads);
QK_API int32_t qk_get_threads(void); /* what the next call would use */

/* ---- Weights in canonical storage --------------------------------------------------------- */

typedef int32_t qk_kind;
enum {
  QK_KIND_INT = 0,  /* w = scale * (code - zero) */
  QK_KIND_TABLE = 1 /* w = (scale * table_scale) * table[code] */
};

typedef int32_t qk_activations;
enum {
  QK_ACT_FLOAT = 0,     /* activations stay as they are; accumulation in float32 */
  QK_ACT_INT8 = 1,      /* int8 at run time, one scale per row */
  QK_ACT_INT8_GROUP = 2 /* int8 at run time, one scale per row and group */
};

typedef int32_t qk_table_per;
enum {
  QK_TABLE_PER_TENSOR = 0,
  QK_TABLE_PER_ROW = 1,
  QK_TABLE_PER_GROUP = 2,
  QK_TABLE_PER_TILE = 3 /* of 8 rows and one group; the last tiles of n and k may be smaller */
};

/* One weight matrix [n, k] in canonical storage, the only form that is ever saved.
 *   codes    per row a dense little-endian bit stream: code k is bits k*b .. k*b+b-1
 *   scales   [n, G] of scale_dtype (F32, F16, BF16, E8M0, E4M3); NULL means 1 everywhere
 *   zeros    [n, G] of zero_dtype (F32, F16, BF16, U8); NULL means 2^(b-1). QK_KIND_INT only
 *   codebook [tables, 2^b] float32; tables is 1, n, n*G or ceil(n/8)*G by `table_per` (row-major).
 *            QK_KIND_TABLE only. With int8 activations every entry is an integer in -128..127.
 *            Tables per tile serve 3 bits; with float activations float16 holds their entries
 *            exactly (float8 e4m3 entries of LUT-B; with int8 activations these are an integer
 *            times a power of two, which goes into an E8M0 scale of the tile's rows)
 *   perm     [k] int32 or NULL: column j of this matrix belongs to column perm[j] of the input */
typedef struct qk_weight {
  uint32_t struct_size;
  qk_kind kind;
  int32_t bits; /* 1..8 */
  qk_activations activations;
  int64_t n, k;
  int64_t group; /* columns per scale, 1..k; k (or 0) for one scale per row */
  const uint8_t* codes;
  int64_t codes_stride_bytes;
  const void* scales;
  qk_dtype scale_dtype;
  int64_t scales_stride;
  const void* zeros;
  qk_dtype zero_dtype;
  int64_t zeros_stride;
  const float* codebook;
  qk_table_per table_per;
  float table_scale; /* 1 where the format has no such factor */
  const int32_t* perm;
} qk_weight;

/* Where qk_unpack writes; NULL pointers are skipped. Arrays are dense. */
typedef struct qk_weight_out {
  uint32_t struct_size;
  uint8_t* codes;
  void* scales;
  void* zeros;
  float* codebook;
  int32_t* perm;
} qk_weight_out;

/* ---- Packed weights ------------------------------------------------------------------------
 * The machine layout (csrc/cpu/layout.h): one self-describing, relocatable block of caller memory,
 * aligned to 64 bytes, the same for all instruction sets. Derived from canonical storage and
 * turned back into it bit for bit; never to be written to disk. */

QK_API qk_status qk_packed_bytes(const qk_weight* weight, int64_t* bytes);
QK_API qk_status qk_pack(const qk_weight* weight, void* packed, int64_t bytes);
/* Fills shape, kind, dtypes, group; a pointer is non-NULL where the weight has that part, and is
 * then not to be followed. */
QK_API qk_status qk_packed_describe(const void* packed, int64_t bytes, qk_weight* weight);
/* The bytes that this packed weight takes, of the `bytes` that the memory has. */
QK_API qk_status qk_packed_size(const void* packed, int64_t bytes, int64_t* size);
QK_API qk_status qk_unpack(const void* packed, int64_t bytes, const qk_weight_out* out);

/* ---- Operations --------------------------------------------------------------------------- */

/* y[M, N] = x[M, K] . W^T + bias. Each row of y has the same bits whatever the other rows, the
 * strides, the alignment, the number of threads and the instruction set are. x, bias and y may lie
 * at any byte; no byte outside their elements is read or written. */
typedef struct qk_linear_args {
  uint32_t struct_size;
  qk_dtype x_dtype; /* F32, F16, BF16 */
  const void* packed;
  int64_t packed_bytes;
  const void* x;
  int64_t m;
  int64_t x_row_stride, x_col_stride; /* any sign */
  const void* bias;                   /* [n] or NULL */
  qk_dtype bias_dtype;                /* F32, F16, BF16 */
  qk_dtype y_dtype;                   /* F32, F16, BF16 */
  void* y;
  int64_t y_row_stride;    /* columns of y are dense */
  const char* kernel;      /* NULL: the best; else exactly this row of the registry */
  void* workspace;         /* 64-byte aligned scratch of qk_linear_workspace bytes, or NULL: the */
  int64_t workspace_bytes; /* library keeps one per calling thread */
  const qk_parallel* parallel; /* NULL: the process-wide choice */
} qk_linear_args;

QK_API qk_status qk_linear(const qk_linear_args* args);
QK_API qk_status qk_linear_workspace(const qk_linear_args* args, int64_t* bytes);
QK_API const char* qk_last_kernel(void); /* which row the last operation of this thread ran */

/* Convolution of x [batch, channels, height, width] with `groups` groups: the weight is packed from
 * [n, channels / groups * kernel_height * kernel_width], its columns in the order (channel, kernel
 * row, kernel column); the first n / groups outputs belong to the first group of channels, and so
 * on. One dimension: height = kernel_height = out_height = 1.
 *
 * A "row of activations" is the patch under one output position, in the order of the columns, with
 * zeros where it lies outside of x; with int8 activations it has scales of its own. Each output has
 * the same bits as qk_linear gives for that row: patches are gathered a block at a time, and the
 * same kernels run on the same packed weight. Scratch is bounded: it grows with the size of a patch
 * and the number of threads, not with the image. */
typedef struct qk_conv_args {
  uint32_t struct_size;
  qk_dtype x_dtype; /* F32, F16, BF16 */
  const void* packed;
  int64_t packed_bytes;
  const void* x;
  int64_t batch, channels, height, width;
  int64_t x_stride[4]; /* of batch, channel, row, column; any sign */
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t pad_top, pad_left; /* below and to the right, positions follow from the output's size */
  int64_t dilation_height, dilation_width;
  int64_t groups;
  const void* bias;    /* [n] or NULL */
  qk_dtype bias_dtype; /* F32, F16, BF16 */
  qk_dtype y_dtype;    /* F32, F16, BF16 */
  void* y;             /* [batch, n, out_height, out_width] */
  int64_t out_height, out_width;
  int64_t y_stride[4]; /* of batch, channel, row, column */
  const char* kernel;  /* NULL: the best; else exactly this row of the registry */
  void* workspace;     /* as in qk_linear_args, of qk_conv_workspace bytes */
  int64_t workspace_bytes;
  const qk_parallel* parallel; /* NULL: the process-wide choice */
} qk_conv_args;

QK_API qk_status qk_conv(const qk_conv_args* args);
QK_API qk_status qk_conv_workspace(const qk_conv_args* args, int64_t* bytes);

/* Mixture of experts: rows offsets[e] .. offsets[e + 1] of x [m, K] times the transposed weight of
 * expert e, plus row e of bias [experts, n]. offsets[0] is 0, offsets[experts] is m; an expert
 * without rows costs nothing. Each row of y has the same bits as qk_linear gives with its expert.
 * `packed` holds the weights of all experts, of one format and shape, one after the other; each
 * begins at the first multiple of 64 bytes behind the one before. */
typedef struct qk_grouped_linear_args {
  uint32_t struct_size;
  qk_dtype x_dtype; /* F32, F16, BF16 */
  const void* packed;
  int64_t packed_bytes;
  int64_t experts;
  const int64_t* offsets; /* [experts + 1] */
  const void* x;
  int64_t m;
  int64_t x_row_stride, x_col_stride; /* any sign */
  const void* bias;                   /* [experts, n] dense, or NULL */
  qk_dtype bias_dtype;                /* F32, F16, BF16 */
  qk_dtype y_dtype;                   /* F32, F16, BF16 */
  void* y;
  int64_t y_row_stride; /* columns of y are dense */
  const char* kernel;   /* NULL: the best; else exactly this row of the registry */
  void* workspace;      /* as in qk_linear_args, of qk_grouped_linear_workspace bytes */
  int64_t workspace_bytes;
  const qk_parallel* parallel; /* NULL: the process-wide choice */
} qk_grouped_linear_args;

QK_API qk_status qk_grouped_linear(const qk_grouped_linear_args* args);
QK_API qk_status qk_grouped_linear_workspace(const qk_grouped_linear_args* args, int64_t* bytes);

/* One line per candidate, best first: "name<TAB>runs|no<TAB>reason\n". Returns the length that
 * the whole text needs, also when `capacity` is smaller; negative on error. */
QK_API int64_t qk_linear_explain(const void* packed, int64_t bytes, char* text, int64_t capacity);

/* out[i, :] = row rows[i] (or row_begin + i where rows is NULL) of W as floats, columns in input
 * order. Serves dequantize and embedding. A row out of range is QK_INVALID_ARGUMENT. */
typedef struct qk_dequantize_args {
  uint32_t struct_size;
  qk_dtype out_dtype;      /* F32, F16, BF16 */
  const qk_weight* weight; /* canonical storage, or NULL */
  const void* packed;      /* packed, where weight is NULL */
  int64_t packed_bytes;
  const int64_t* rows;
  int64_t row_begin, row_count;
  void* out;
  int64_t out_row_stride;
  const char* kernel;
  const qk_parallel* parallel;
} qk_dequantize_args;

QK_API qk_status qk_dequantize(const qk_dequantize_args* args);

/* Symmetric int8 per row and group of `group` columns (0: the whole row), half to even:
 * scale = max|x| / 127, q = rint(x * (127 / max|x|)). A group of zeros (or one whose maximum is
 * below 2^-100) has scale 0 and zeros; a group with NaN or infinity has scale NaN and zeros. */
typedef struct qk_quantize_args {
  uint32_t struct_size;
  qk_dtype x_dtype;
  const void* x;
  int64_t m, k, group;
  int64_t x_row_stride, x_col_stride;
  int8_t* q;
  int64_t q_row_stride;
  float* scales; /* [m, G] dense */
  const char* kernel;
  const qk_parallel* parallel;
} qk_quantize_args;

QK_API qk_status qk_quantize_activations(const qk_quantize_args* args);

/* c[M, N] = a[M, K] . b[K, N] of int8, exactly. k is at most 131071: then no sum leaves int32. Any
 * strides; fast where columns of a and rows or columns of b are dense. b is read in place where its
 * row stride is 1 (a transposed weight [N, K]), else block by block through scratch. */
typedef struct qk_int8_matmul_args {
  uint32_t struct_size;
  const int8_t* a;
  const int8_t* b;
  int32_t* c;
  int64_t m, n, k;
  int64_t a_row_stride, a_col_stride; /* any sign */
  int64_t b_row_stride, b_col_stride; /* any sign */
  int64_t c_row_stride;               /* columns of c are dense */
  const char* kernel;
  const qk_parallel* parallel;
} qk_int8_matmul_args;

QK_API qk_status qk_int8_matmul(const qk_int8_matmul_args* args);

/* ---- Codes ---------------------------------------------------------------------------------
 * One byte per code to the dense bit stream of canonical storage and back. */
QK_API qk_status qk_codes_pack(const uint8_t* codes, int64_t n, int64_t k, int64_t codes_stride,
                               int32_t bits, uint8_t* stream, int64_t stream_stride_bytes);
QK_API qk_status qk_codes_unpack(const uint8_t* stream, int64_t n, int64_t k,
                                 int64_t stream_stride_bytes, int32_t bits, uint8_t* codes,
                                 int64_t codes_stride);

/* ---- Fitting: from float32 weights to codes ----------------------------------------------- */

/* Round to nearest (half to even) on a uniform grid, per row and group.
 *   symmetric: scale = max|w| / (2^(b-1) - 1), code = clamp(rint(w / scale), -2^(b-1),
 *              2^(b-1) - 1) + 2^(b-1)
 *   else:      the range is widened to hold 0; scale = (max - min) / (2^b - 1),
 *              zero = clamp(rint(-min / scale), 0, 2^b - 1),
 *              code = clamp(rint(w / scale) + zero, 0, 2^b - 1)
 * The scale is rounded to scale_dtype before codes are computed from it. A group of zeros gets
 * scale 1. Where a scale does not fit scale_dtype (not finite, or below its smallest normal
 * number) nothing is written and the status is QK_BAD_FORMAT. */
typedef struct qk_fit_rtn_args {
  uint32_t struct_size;
  int32_t bits;
  const float* w;
  int64_t n, k, w_stride;
  int64_t group;
  int32_t symmetric;
  qk_dtype scale_dtype; /* F32, F16, BF16 */
  uint8_t* codes;       /* bit stream */
  int64_t codes_stride_bytes;
  void* scales;   /* [n, G] dense */
  uint8_t* zeros; /* [n, G] dense; NULL where symmetric */
  const qk_parallel* parallel;
} qk_fit_rtn_args;

QK_API qk_status qk_fit_rtn(const qk_fit_rtn_args* args);

/* Codes of the nearest entry of a given table after division by the scale; ties go to the lower
 * entry of the sorted table. `tables` is 1, n or n*G by table_per; entries need not be sorted. */
typedef struct qk_fit_table_args {
  uint32_t struct_size;
  int32_t bits;
  const float* w;
  int64_t n, k, w_stride;
  int64_t group;
  const float* scales; /* [n, G] dense float32, or NULL: 1 */
  const float* codebook;
  qk_table_per table_per;
  uint8_t* codes;
  int64_t codes_stride_bytes;
  const qk_parallel* parallel;
} qk_fit_table_args;

QK_API qk_status qk_fit_table(const qk_fit_table_args* args);

/* Exact optimal one-dimensional k-means with 2^b centres, one table per segment (row, or group of
 * a row, or the whole matrix). With `importance`, weighted squares. Entries ascend; where a
 * segment has fewer distinct values than entries the last value repeats. */
typedef struct qk_fit_kmeans_args {
  uint32_t struct_size;
  int32_t bits;
  const float* w;
  int64_t n, k, w_stride;
  qk_table_per table_per;
  int64_t group;                 /* QK_TABLE_PER_GROUP: columns per table */
  const float* importance;       /* >= 0; NULL: 1 */
  int64_t importance_row_stride; /* 0: one vector [k] for all rows */
  float* codebook;               /* [tables, 2^b] dense */
  uint8_t* codes;                /* bit stream */
  int64_t codes_stride_bytes;
  double* errors; /* [tables] sum of (weighted) squared errors, or NULL */
  const qk_parallel* parallel;
} qk_fit_kmeans_args;

QK_API qk_status qk_fit_kmeans(const qk_fit_kmeans_args* args);

/* LUT-B: the table of 8 float8 (e4m3) numbers with the least sum of (weighted) squared errors for
 * each tile of 8 rows and 64 columns, and 3-bit codes. Entries ascend; where a tile needs fewer,
 * the last repeats. With int8 activations every entry is an integer of at most 120 times 2^(E-6),
 * 2^E <= the largest entry's magnitude < 2^(E+1). Beyond 448 weights saturate. */
typedef struct qk_fit_tiles_args {
  uint32_t struct_size;
  qk_activations activations;
  const float* w;
  int64_t n, k, w_stride;
  const float* importance;       /* >= 0; NULL: 1 */
  int64_t importance_row_stride; /* 0: one vector [k] for all rows */
  uint8_t* codebook;             /* [ceil(n/8) * ceil(k/64), 8] dense, bytes of float8 */
  uint8_t* codes;                /* bit stream */
  int64_t codes_stride_bytes;
  double* errors; /* [tiles], or NULL */
  const qk_parallel* parallel;
} qk_fit_tiles_args;

QK_API qk_status qk_fit_tiles(const qk_fit_tiles_args* args);

/* ---- The registry ------------------------------------------------------------------------- */

typedef struct qk_kernel_info {
  uint32_t struct_size;
  qk_isa isa;
  const char* name;        /* "linear_w4a8d_avx512vnni" */
  const char* op;          /* "linear", "dequantize", "quantize_activations", "int8_matmul" */
  const char* weights;     /* what it reads, in words */
  const char* activations; /* "float", "int8, int8_group" */
  int32_t usable;          /* 1 where this machine and the cap allow it */
} qk_kernel_info;

QK_API int32_t qk_kernel_count(void);
QK_API qk_status qk_kernel_at(int32_t index, qk_kernel_info* info);

#ifdef __cplusplus
}
#endif

#endif
