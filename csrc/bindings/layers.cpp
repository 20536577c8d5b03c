// SPDX-License-Identifier: Apache-2.0
// qkern._core: convolution and mixture of experts (qk_conv, qk_grouped_linear).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>

#include "check.h"
#include "qkern/qkern.h"

namespace py = pybind11;
using qkern::python::check;

namespace {

using Address = std::uintptr_t;
using Four = std::array<int64_t, 4>;
using Two = std::array<int64_t, 2>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// `outputs`: channels that the caller's y has; the packed weight has the last word on what is
// written, so they must agree.
void check_outputs(Address packed, int64_t bytes, int64_t outputs) {
  qk_weight w = {};
  w.struct_size = sizeof w;
  check(qk_packed_describe(at<const void>(packed), bytes, &w));
  if (w.n == outputs) return;
  throw py::value_error("the weight has " + std::to_string(w.n) + " outputs, but " +
                        std::to_string(outputs) + " were expected");
}

void conv(Address packed, int64_t packed_bytes, int dtype, Address x, const Four& x_shape,
          const Four& x_stride, const Two& kernel_size, const Two& stride, const Two& padding,
          const Two& dilation, int64_t groups, Address bias, int bias_dtype, Address y,
          const Four& y_shape, const Four& y_stride, const char* kernel) {
  check_outputs(packed, packed_bytes, y_shape[1]);
  qk_conv_args a = {};
  a.struct_size = sizeof a;
  a.packed = at<const void>(packed);
  a.packed_bytes = packed_bytes;
  a.x_dtype = a.y_dtype = dtype;
  a.x = at<const void>(x);
  a.batch = x_shape[0];
  a.channels = x_shape[1];
  a.height = x_shape[2];
  a.width = x_shape[3];
  std::copy(x_stride.begin(), x_stride.end(), a.x_stride);
  a.kernel_height = kernel_size[0];
  a.kernel_width = kernel_size[1];
  a.stride_height = stride[0];
  a.stride_width = stride[1];
  a.pad_top = padding[0];
  a.pad_left = padding[1];
  a.dilation_height = dilation[0];
  a.dilation_width = dilation[1];
  a.groups = groups;
  a.bias = at<const void>(bias);
  a.bias_dtype = bias_dtype;
  a.y = at<void>(y);
  a.out_height = y_shape[2];
  a.out_width = y_shape[3];
  std::copy(y_stride.begin(), y_stride.end(), a.y_stride);
  a.kernel = kernel;
  check(qk_conv(&a));
}

void grouped_linear(Address packed, int64_t packed_bytes, int64_t experts, Address offsets,
                    int dtype, Address x, const Two& x_shape, const Two& x_stride, Address bias,
                    int bias_dtype, Address y, int64_t outputs, const char* kernel) {
  check_outputs(packed, packed_bytes, outputs);
  qk_weight w = {};
  w.struct_size = sizeof w;
  check(qk_packed_describe(at<const void>(packed), packed_bytes, &w));
  if (w.k != x_shape[1])
    throw py::value_error("the weights have " + std::to_string(w.k) + " columns, but x has " +
                          std::to_string(x_shape[1]));
  qk_grouped_linear_args a = {};
  a.struct_size = sizeof a;
  a.packed = at<const void>(packed);
  a.packed_bytes = packed_bytes;
  a.experts = experts;
  a.offsets = at<const int64_t>(offsets);
  a.x_dtype = a.y_dtype = dtype;
  a.x = at<const void>(x);
  a.m = x_shape[0];
  a.x_row_stride = x_stride[0];
  a.x_col_stride = x_stride[1];
  a.bias = at<const void>(bias);
  a.bias_dtype = bias_dtype;
  a.y = at<void>(y);
  a.y_row_stride = outputs;
  a.kernel = kernel;
  check(qk_grouped_linear(&a));
}

}  // namespace

void bind_layers(py::module_& m) {
  using namespace py::literals;
  m.def("packed_size", [](Address packed, int64_t bytes) {
    int64_t size = 0;
    check(qk_packed_size(at<const void>(packed), bytes, &size));
    return size;
  });
  m.def("conv", &conv, "packed"_a, "packed_bytes"_a, "dtype"_a, "x"_a, "x_shape"_a, "x_stride"_a,
        "kernel_size"_a, "stride"_a, "padding"_a, "dilation"_a, "groups"_a, "bias"_a,
        "bias_dtype"_a, "y"_a, "y_shape"_a, "y_stride"_a, "kernel"_a = nullptr,
        py::call_guard<py::gil_scoped_release>());
  m.def("grouped_linear", &grouped_linear, "packed"_a, "packed_bytes"_a, "experts"_a, "offsets"_a,
        "dtype"_a, "x"_a, "x_shape"_a, "x_stride"_a, "bias"_a, "bias_dtype"_a, "y"_a, "outputs"_a,
        "kernel"_a = nullptr, py::call_guard<py::gil_scoped_release>());
}
