/* SPDX-License-Identifier: Apache-2.0
 * A C99 program: quantizes a matrix to int4, multiplies, compares with its own loops, and makes
 * the mistakes that the interface must answer with a status and a sentence. */

#include <math.h>
#include <qkern/qkern.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { M = 3, N = 37, K = 100, GROUP = 32, GROUPS = (K + GROUP - 1) / GROUP, STREAM = K / 2 };

static int failures = 0;

static void check(int holds, const char* what) {
  if (!holds) {
    fprintf(stderr, "plain: not so: %s (last error: %s)\n", what, qk_last_error());
    ++failures;
  }
}

/* Memory at a multiple of 64 inside a block that is never freed: C99 has no aligned_alloc. */
static void* aligned(int64_t bytes) {
  char* block = malloc((size_t)bytes + 63);
  return block + (64 - (uintptr_t)block % 64) % 64;
}

int main(void) {
  static float w[N * K], x[M * K], y[M * N], scales[N * GROUPS], rows[N * K];
  static uint8_t codes[N * STREAM];
  qk_fit_rtn_args fit;
  qk_weight weight, described;
  qk_linear_args linear;
  qk_dequantize_args dequantize;
  int64_t bytes = 0;
  void* packed;
  int i, j, k;

  for (i = 0; i < N * K; ++i) w[i] = (float)sin(i * 0.37);
  for (i = 0; i < M * K; ++i) x[i] = (float)cos(i * 0.11);

  memset(&fit, 0, sizeof fit);
  fit.struct_size = sizeof fit;
  fit.bits = 4;
  fit.w = w;
  fit.n = N;
  fit.k = K;
  fit.w_stride = K;
  fit.group = GROUP;
  fit.symmetric = 1;
  fit.scale_dtype = QK_F32;
  fit.codes = codes;
  fit.codes_stride_bytes = STREAM;
  fit.scales = scales;
  check(qk_fit_rtn(&fit) == QK_OK, "int4 codes are fitted");

  memset(&weight, 0, sizeof weight);
  weight.struct_size = sizeof weight;
  weight.kind = QK_KIND_INT;
  weight.bits = 4;
  weight.activations = QK_ACT_FLOAT;
  weight.n = N;
  weight.k = K;
  weight.group = GROUP;
  weight.codes = codes;
  weight.codes_stride_bytes = STREAM;
  weight.scales = scales;
  weight.scale_dtype = QK_F32;
  weight.scales_stride = GROUPS;
  check(qk_packed_bytes(&weight, &bytes) == QK_OK, "the size of the packed weight is known");
  packed = aligned(bytes);
  check(qk_pack(&weight, packed, bytes) == QK_OK, "the weight is packed");

  memset(&described, 0, sizeof described);
  described.struct_size = sizeof described;
  check(qk_packed_describe(packed, bytes, &described) == QK_OK && described.n == N &&
            described.k == K && described.bits == 4 && described.group == GROUP,
        "the packed weight describes itself");

  memset(&dequantize, 0, sizeof dequantize);
  dequantize.struct_size = sizeof dequantize;
  dequantize.out_dtype = QK_F32;
  dequantize.packed = packed;
  dequantize.packed_bytes = bytes;
  dequantize.row_count = N;
  dequantize.out = rows;
  dequantize.out_row_stride = K;
  check(qk_dequantize(&dequantize) == QK_OK, "the weight is dequantized");
  for (i = 0; i < N; ++i)
    for (k = 0; k < K; ++k) {
      const int code = codes[i * STREAM + k / 2] >> (k % 2 * 4) & 15;
      const float value = scales[i * GROUPS + k / GROUP] * (float)(code - 8);
      check(rows[i * K + k] == value, "a dequantized weight is scale * (code - 8)");
    }

  memset(&linear, 0, sizeof linear);
  linear.struct_size = sizeof linear;
  linear.packed = packed;
  linear.packed_bytes = bytes;
  linear.x = x;
  linear.x_dtype = QK_F32;
  linear.m = M;
  linear.x_row_stride = K;
  linear.x_col_stride = 1;
  linear.y = y;
  linear.y_dtype = QK_F32;
  linear.y_row_stride = N;
  check(qk_linear(&linear) == QK_OK, "the product is computed");
  for (i = 0; i < M; ++i)
    for (j = 0; j < N; ++j) {
      double sum = 0, size = 0;
      for (k = 0; k < K; ++k) {
        const double term = (double)x[i * K + k] * rows[j * K + k];
        sum += term;
        size += fabs(term);
      }
      /* K + 2 roundings of float32 at the most, each at most 2^-24 of the sum of magnitudes. */
      check(fabs(y[i * N + j] - sum) <= (K + 2) * size / (1 << 24), "y is x times the weight");
    }

  /* Mistakes. */
  linear.struct_size = 4;
  check(qk_linear(&linear) == QK_INVALID_ARGUMENT && strstr(qk_last_error(), "struct_size"),
        "a struct that is too small is refused");
  linear.struct_size = sizeof linear + 8;
  check(qk_linear(&linear) == QK_UNSUPPORTED && strstr(qk_last_error(), "newer"),
        "a struct of a newer header is refused");
  linear.struct_size = sizeof linear;
  linear.packed_bytes = bytes - 1;
  check(qk_linear(&linear) != QK_OK, "a packed weight that was cut is refused");
  linear.packed_bytes = bytes;
  linear.kernel = "no_such_kernel";
  check(qk_linear(&linear) == QK_INVALID_ARGUMENT, "an unknown kernel is refused");
  linear.kernel = NULL;
  linear.packed = (char*)packed + 1;
  check(qk_linear(&linear) != QK_OK, "a packed weight that is not aligned is refused");

  printf("plain: qkern %s, interface %d, %s, %d failures\n", qk_version(), (int)qk_abi_version(),
         qk_isa_name(qk_active_isa()), failures);
  return failures != 0;
}
