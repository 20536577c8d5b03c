// SPDX-License-Identifier: Apache-2.0
// Codes of the nearest entry of a given table: of the quotient fl(w / scale), a float32 division.
#include "fit_args.h"
#include "fit_nearest.h"

namespace qkern {
namespace {

constexpr const char* kCall = "qk_fit_table";

qk_status check(qk_fit_table_args* a) {
  if (qk_status s = check_bits(kCall, a->bits, 1)) return s;
  if (qk_status s = check_rows(kCall, "w", a->w, a->n, a->k, a->w_stride)) return s;
  if (qk_status s = check_table_per(kCall, a->table_per)) return s;
  if (qk_status s = check_group(kCall, a->k, &a->group)) return s;
  return check_rows(kCall, "codes", a->codes, a->n, stream_bytes(a->k, a->bits),
                    a->codes_stride_bytes);
}

}  // namespace
}  // namespace qkern

using namespace qkern;

extern "C" qk_status qk_fit_table(const qk_fit_table_args* args) {
  qk_fit_table_args a;
  if (qk_status s = read_struct("qk_fit_table_args", args, &a)) return s;
  if (qk_status s = check_parallel(a.parallel)) return s;
  if (qk_status s = check(&a)) return s;
  if (a.n == 0 || a.k == 0) return QK_OK;
  const int64_t groups = ceil_div(a.k, a.group), size = INT64_C(1) << a.bits;
  const int64_t tables = a.table_per == QK_TABLE_PER_TENSOR ? 1
                         : a.table_per == QK_TABLE_PER_ROW  ? a.n
                                                            : a.n * groups;
  if (qk_status s = check_rows(kCall, "codebook", a.codebook, tables, size, size)) return s;
  if (qk_status s = check_numbers(kCall, "w", a.parallel, a.w, a.n, a.k, a.w_stride, true))
    return s;
  if (qk_status s =
          check_numbers(kCall, "codebook", a.parallel, a.codebook, tables, size, size, true))
    return s;
  if (a.scales)
    if (qk_status s =
            check_numbers(kCall, "scales", a.parallel, a.scales, a.n, groups, groups, true))
      return s;
  const TableMap map = {a.codebook, a.table_per, a.group, groups, a.bits};
  Nearest first;
  first.build(a.codebook, a.bits);
  const Nearest* shared = a.table_per == QK_TABLE_PER_TENSOR ? &first : nullptr;
  parallel_for(a.parallel, a.n, [&](int64_t row) {
    encode_row(map, shared, a.w + row * a.w_stride, a.k, row,
               a.scales ? a.scales + row * groups : nullptr, a.codes + row * a.codes_stride_bytes);
  });
  return QK_OK;
}
