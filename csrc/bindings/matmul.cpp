// SPDX-License-Identifier: Apache-2.0
// Products of int8 matrices. Addresses, sizes and strides come in; callers have checked dtypes.
#include <pybind11/pybind11.h>

#include "check.h"
#include "qkern/qkern.h"

namespace py = pybind11;
using Address = std::uintptr_t;

void bind_matmul(py::module_& m) {
  using namespace py::literals;
  m.def(
      "int8_matmul",
      [](Address a, Address b, Address c, int64_t m, int64_t n, int64_t k, int64_t a_row_stride,
         int64_t a_col_stride, int64_t b_row_stride, int64_t b_col_stride, int64_t c_row_stride,
         const char* kernel) {
        qk_int8_matmul_args args = {};
        args.struct_size = sizeof args;
        args.a = reinterpret_cast<const int8_t*>(a);
        args.b = reinterpret_cast<const int8_t*>(b);
        args.c = reinterpret_cast<int32_t*>(c);
        args.m = m;
        args.n = n;
        args.k = k;
        args.a_row_stride = a_row_stride;
        args.a_col_stride = a_col_stride;
        args.b_row_stride = b_row_stride;
        args.b_col_stride = b_col_stride;
        args.c_row_stride = c_row_stride;
        args.kernel = kernel;
        qkern::python::check(qk_int8_matmul(&args));
      },
      "a"_a, "b"_a, "c"_a, "m"_a, "n"_a, "k"_a, "a_row_stride"_a, "a_col_stride"_a,
      "b_row_stride"_a, "b_col_stride"_a, "c_row_stride"_a, "kernel"_a = nullptr,
      py::call_guard<py::gil_scoped_release>());
}
