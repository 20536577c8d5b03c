// SPDX-License-Identifier: Apache-2.0
// qkern._cuda: the CUDA library for Python. The library is opened by open(path), so that importing
// this module needs neither a driver nor a device. Addresses are plain integers; qkern/backends/
// cuda.py has checked dtypes, shapes and devices. Private.

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include "check.h"
#include "qkern/qkern_cuda.h"
#include "weight.h"

namespace py = pybind11;
using qkern::python::Address;
using qkern::python::at;
using qkern::python::make_weight;
using qkern::python::raise_status;
using qkern::python::Weight;

namespace {

// The entry points, resolved once.
struct Library {
#define QKERN_CUDA_FUNCTIONS(apply)                                                          \
  apply(abi_version) apply(layout_version) apply(last_error) apply(packed_bytes) apply(pack) \
      apply(unpack) apply(linear_supported) apply(linear_workspace) apply(linear)            \
          apply(grouped_linear_workspace) apply(grouped_linear) apply(linear_grad_workspace) \
              apply(linear_grad_input) apply(last_kernel) apply(dequantize)                  \
                  apply(quantize_activations) apply(kernel_count) apply(kernel_at)
#define QKERN_DECLARE(name) decltype(&qk_cuda_##name) name = nullptr;
  QKERN_CUDA_FUNCTIONS(QKERN_DECLARE)
#undef QKERN_DECLARE
};

Library library;
bool opened = false;

void open(const std::string& path) {
  if (opened) return;
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw std::runtime_error(dlerror());
#define QKERN_RESOLVE(name)                                                  \
  library.name = (decltype(&qk_cuda_##name))dlsym(handle, "qk_cuda_" #name); \
  if (!library.name) throw std::runtime_error(path + " lacks qk_cuda_" #name "; rebuild it");
  QKERN_CUDA_FUNCTIONS(QKERN_RESOLVE)
#undef QKERN_RESOLVE
  if (library.abi_version() != QK_CUDA_ABI_VERSION)
    throw std::runtime_error(path + " has another ABI version; rebuild it");
  opened = true;
}

void require() {
  if (!opened) throw std::runtime_error("qkern._cuda.open(path) comes first");
}

void check(qk_status status) {
  if (status != QK_OK) raise_status(status, library.last_error());
}

qk_cuda_linear_args linear_args(const Weight& weight, Address packed, int64_t packed_bytes,
                                int device, Address stream, int x_dtype, Address x, int64_t m,
                                int64_t x_row_stride, int64_t x_col_stride, int bias_dtype,
                                Address bias, int y_dtype, Address y, int64_t y_row_stride,
                                Address workspace, int64_t workspace_bytes) {
  return {sizeof(qk_cuda_linear_args),
          device,
          at<void>(stream),
          &weight.w,
          at<const void>(packed),
          packed_bytes,
          x_dtype,
          at<const void>(x),
          m,
          x_row_stride,
          x_col_stride,
          bias_dtype,
          at<const void>(bias),
          y_dtype,
          at<void>(y),
          y_row_stride,
          at<void>(workspace),
          workspace_bytes};
}

// Numbers of experts, and addresses of their offsets and factors, make a product grouped.
qk_cuda_grouped_linear_args grouped_args(const qk_cuda_linear_args& linear, int64_t experts,
                                         Address offsets, Address table_scales) {
  return {sizeof(qk_cuda_grouped_linear_args), linear, experts, at<const int64_t>(offsets),
          at<const float>(table_scales)};
}

qk_cuda_grad_args grad_args(const Weight& weight, Address packed, int64_t packed_bytes, int device,
                            Address stream, int dtype, Address dy, int64_t m, int64_t dy_row_stride,
                            int64_t dy_col_stride, Address dx, int64_t dx_row_stride,
                            Address workspace, int64_t workspace_bytes) {
  return {sizeof(qk_cuda_grad_args),
          device,
          at<void>(stream),
          &weight.w,
          at<const void>(packed),
          packed_bytes,
          dtype,
          at<const void>(dy),
          m,
          dy_row_stride,
          dy_col_stride,
          at<void>(dx),
          dx_row_stride,
          at<void>(workspace),
          workspace_bytes};
}

py::list kernels() {
  require();
  py::list rows;
  for (int i = 0; i < library.kernel_count(); ++i) {
    qk_cuda_kernel_info info = {};
    info.struct_size = sizeof info;
    check(library.kernel_at(i, &info));
    py::dict row;
    row["name"] = info.name;
    row["weights"] = info.weights;
    row["bits"] = info.bits;
    row["table_per"] = info.table_per;
    row["activations"] = info.activations;
    rows.append(row);
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  using namespace py::literals;
  const auto free = py::call_guard<py::gil_scoped_release>();
  py::class_<Weight>(m, "Weight")
      .def(py::init(&make_weight), py::kw_only(), "kind"_a, "bits"_a, "activations"_a, "n"_a, "k"_a,
           "group"_a = 0, "codes"_a = 0, "codes_stride"_a = 0, "scales"_a = 0, "scale_dtype"_a = 0,
           "scales_stride"_a = 0, "zeros"_a = 0, "zero_dtype"_a = 0, "zeros_stride"_a = 0,
           "codebook"_a = 0, "table_per"_a = 0, "table_scale"_a = 1.0f, "perm"_a = 0);
  m.def("open", &open);
  m.def("kernels", &kernels);
  m.def("layout_version", [] { return require(), library.layout_version(); });
  m.def("last_kernel", [] { return require(), library.last_kernel(); });
  m.def("packed_bytes", [](const Weight& weight) {
    require();
    int64_t bytes = 0;
    check(library.packed_bytes(&weight.w, &bytes));
    return bytes;
  });
  m.def(
      "pack",
      [](const Weight& weight, Address packed, int64_t bytes, int device, Address stream) {
        require();
        check(library.pack(&weight.w, at<void>(packed), bytes, device, at<void>(stream)));
      },
      free);
  m.def(
      "unpack",
      [](const Weight& weight, Address packed, int64_t bytes, Address codes, Address scales,
         Address zeros, Address codebook, Address perm, int device, Address stream) {
        require();
        const qk_weight_out out = {sizeof(qk_weight_out), at<uint8_t>(codes),  at<void>(scales),
                                   at<void>(zeros),       at<float>(codebook), at<int32_t>(perm)};
        check(library.unpack(&weight.w, at<const void>(packed), bytes, &out, device,
                             at<void>(stream)));
      },
      free);
  m.def("linear_supported", [](const Weight& weight, int x_dtype) {
    require();
    check(library.linear_supported(&weight.w, x_dtype));
  });
  m.def("linear_workspace",
        [](const Weight& weight, Address packed, int64_t packed_bytes, int device, int x_dtype,
           Address x, int64_t rows, int64_t x_row_stride, int64_t x_col_stride, int64_t experts,
           Address offsets) {
          require();
          const qk_cuda_linear_args a =
              linear_args(weight, packed, packed_bytes, device, 0, x_dtype, x, rows, x_row_stride,
                          x_col_stride, QK_F32, 0, QK_F32, 0, 0, 0, 0);
          const qk_cuda_grouped_linear_args g = grouped_args(a, experts, offsets, 0);
          int64_t bytes = 0;
          check(experts ? library.grouped_linear_workspace(&g, &bytes)
                        : library.linear_workspace(&a, &bytes));
          return bytes;
        });
  m.def(
      "linear",
      [](const Weight& weight, Address packed, int64_t packed_bytes, int device, Address stream,
         int x_dtype, Address x, int64_t rows, int64_t x_row_stride, int64_t x_col_stride,
         int bias_dtype, Address bias, int y_dtype, Address y, int64_t y_row_stride,
         Address workspace, int64_t workspace_bytes, int64_t experts, Address offsets,
         Address table_scales) {
        require();
        const qk_cuda_linear_args a = linear_args(
            weight, packed, packed_bytes, device, stream, x_dtype, x, rows, x_row_stride,
            x_col_stride, bias_dtype, bias, y_dtype, y, y_row_stride, workspace, workspace_bytes);
        const qk_cuda_grouped_linear_args g = grouped_args(a, experts, offsets, table_scales);
        check(experts ? library.grouped_linear(&g) : library.linear(&a));
      },
      free);
  m.def("linear_grad_workspace",
        [](const Weight& weight, Address packed, int64_t packed_bytes, int device, int dtype,
           Address dy, int64_t rows, int64_t dy_row_stride, int64_t dy_col_stride) {
          require();
          const qk_cuda_grad_args a = grad_args(weight, packed, packed_bytes, device, 0, dtype, dy,
                                                rows, dy_row_stride, dy_col_stride, 0, 0, 0, 0);
          int64_t bytes = 0;
          check(library.linear_grad_workspace(&a, &bytes));
          return bytes;
        });
  m.def(
      "linear_grad_input",
      [](const Weight& weight, Address packed, int64_t packed_bytes, int device, Address stream,
         int dtype, Address dy, int64_t rows, int64_t dy_row_stride, int64_t dy_col_stride,
         Address dx, int64_t dx_row_stride, Address workspace, int64_t workspace_bytes) {
        require();
        const qk_cuda_grad_args a =
            grad_args(weight, packed, packed_bytes, device, stream, dtype, dy, rows, dy_row_stride,
                      dy_col_stride, dx, dx_row_stride, workspace, workspace_bytes);
        check(library.linear_grad_input(&a));
      },
      free);
  m.def(
      "dequantize",
      [](const Weight& weight, Address packed, int64_t packed_bytes, int device, Address stream,
         Address rows, int64_t row_begin, int64_t row_count, int out_dtype, Address out,
         int64_t out_row_stride) {
        require();
        const qk_cuda_dequantize_args a = {sizeof(qk_cuda_dequantize_args),
                                           device,
                                           at<void>(stream),
                                           &weight.w,
                                           at<const void>(packed),
                                           packed_bytes,
                                           at<const int64_t>(rows),
                                           row_begin,
                                           row_count,
                                           out_dtype,
                                           at<void>(out),
                                           out_row_stride};
        check(library.dequantize(&a));
      },
      free);
  m.def(
      "quantize_activations",
      [](int device, Address stream, int x_dtype, Address x, int64_t rows, int64_t columns,
         int64_t group, int64_t x_row_stride, int64_t x_col_stride, Address q, int64_t q_row_stride,
         Address scales) {
        require();
        const qk_cuda_quantize_args a = {sizeof(qk_cuda_quantize_args),
                                         device,
                                         at<void>(stream),
                                         x_dtype,
                                         at<const void>(x),
                                         rows,
                                         columns,
                                         group,
                                         x_row_stride,
                                         x_col_stride,
                                         at<int8_t>(q),
                                         q_row_stride,
                                         at<float>(scales)};
        check(library.quantize_activations(&a));
      },
      free);
}
