// SPDX-License-Identifier: Apache-2.0
// qkern._core: the C interface for Python. Addresses are plain integers; whoever calls has checked
// dtypes, shapes and devices (qkern/tensor.py, qkern/ops.py). Private.

#include <pybind11/pybind11.h>

#include <string>

#include "check.h"
#include "weight.h"

namespace py = pybind11;
using qkern::python::Address;
using qkern::python::at;
using qkern::python::check;
using qkern::python::make_weight;
using qkern::python::Weight;

void bind_eager(py::module_& m);
void bind_fit(py::module_& m);
void bind_matmul(py::module_& m);
void bind_layers(py::module_& m);

namespace {

py::dict describe(Address packed, int64_t bytes) {
  qk_weight w = {};
  w.struct_size = sizeof w;
  check(qk_packed_describe(at<const void>(packed), bytes, &w));
  py::dict d;
  d["kind"] = w.kind;
  d["bits"] = w.bits;
  d["activations"] = w.activations;
  d["n"] = w.n;
  d["k"] = w.k;
  d["group"] = w.group;
  d["scale_dtype"] = w.scales ? py::object(py::int_(w.scale_dtype)) : py::none();
  d["zero_dtype"] = w.zeros ? py::object(py::int_(w.zero_dtype)) : py::none();
  d["table_per"] = w.codebook ? py::object(py::int_(w.table_per)) : py::none();
  d["table_scale"] = w.table_scale;
  d["perm"] = w.perm != nullptr;
  return d;
}

void unpack(Address packed, int64_t bytes, Address codes, Address scales, Address zeros,
            Address codebook, Address perm) {
  const qk_weight_out out = {sizeof(qk_weight_out), at<uint8_t>(codes),  at<void>(scales),
                             at<void>(zeros),       at<float>(codebook), at<int32_t>(perm)};
  check(qk_unpack(at<const void>(packed), bytes, &out));
}

// x_columns and y_columns (-1: not told) are what the caller's arrays have; the packed weight has
// the last word on what is read and written, so they must agree.
void linear(Address packed, int64_t packed_bytes, int x_dtype, Address x, int64_t m,
            int64_t x_row_stride, int64_t x_col_stride, Address bias, int bias_dtype, int y_dtype,
            Address y, int64_t y_row_stride, const char* kernel, int64_t x_columns,
            int64_t y_columns) {
  if (x_columns >= 0 || y_columns >= 0) {
    qk_weight w = {};
    w.struct_size = sizeof w;
    check(qk_packed_describe(at<const void>(packed), packed_bytes, &w));
    if ((x_columns >= 0 && x_columns != w.k) || (y_columns >= 0 && y_columns != w.n)) {
      const std::string sentence = "the weight maps " + std::to_string(w.k) + " columns to " +
                                   std::to_string(w.n) + ", but the input has " +
                                   std::to_string(x_columns) + " columns and the output " +
                                   std::to_string(y_columns);
      throw py::value_error(sentence);
    }
  }
  qk_linear_args a = {};
  a.struct_size = sizeof a;
  a.packed = at<const void>(packed);
  a.packed_bytes = packed_bytes;
  a.x_dtype = x_dtype;
  a.x = at<const void>(x);
  a.m = m;
  a.x_row_stride = x_row_stride;
  a.x_col_stride = x_col_stride;
  a.bias = at<const void>(bias);
  a.bias_dtype = bias_dtype;
  a.y_dtype = y_dtype;
  a.y = at<void>(y);
  a.y_row_stride = y_row_stride;
  a.kernel = kernel;
  check(qk_linear(&a));
}

void dequantize(const Weight* weight, Address packed, int64_t packed_bytes, int out_dtype,
                Address rows, int64_t row_begin, int64_t row_count, Address out,
                int64_t out_row_stride, const char* kernel) {
  qk_dequantize_args a = {};
  a.struct_size = sizeof a;
  a.out_dtype = out_dtype;
  a.weight = weight ? &weight->w : nullptr;
  a.packed = at<const void>(packed);
  a.packed_bytes = packed_bytes;
  a.rows = at<const int64_t>(rows);
  a.row_begin = row_begin;
  a.row_count = row_count;
  a.out = at<void>(out);
  a.out_row_stride = out_row_stride;
  a.kernel = kernel;
  check(qk_dequantize(&a));
}

void quantize_activations(int x_dtype, Address x, int64_t m, int64_t k, int64_t group,
                          int64_t x_row_stride, int64_t x_col_stride, Address q,
                          int64_t q_row_stride, Address scales, const char* kernel) {
  qk_quantize_args a = {};
  a.struct_size = sizeof a;
  a.x_dtype = x_dtype;
  a.x = at<const void>(x);
  a.m = m;
  a.k = k;
  a.group = group;
  a.x_row_stride = x_row_stride;
  a.x_col_stride = x_col_stride;
  a.q = at<int8_t>(q);
  a.q_row_stride = q_row_stride;
  a.scales = at<float>(scales);
  a.kernel = kernel;
  check(qk_quantize_activations(&a));
}

py::list kernels() {
  py::list rows;
  for (int i = 0; i < qk_kernel_count(); ++i) {
    qk_kernel_info info = {};
    info.struct_size = sizeof info;
    check(qk_kernel_at(i, &info));
    py::dict row;
    row["name"] = info.name;
    row["op"] = info.op;
    row["isa"] = qk_isa_name(info.isa);
    row["weights"] = info.weights;
    row["activations"] = info.activations;
    row["usable"] = info.usable != 0;
    rows.append(row);
  }
  return rows;
}

std::string explain(Address packed, int64_t bytes) {
  const int64_t length = qk_linear_explain(at<const void>(packed), bytes, nullptr, 0);
  if (length < 0) check(QK_INVALID_ARGUMENT);
  std::string text((size_t)length + 1, '\0');
  qk_linear_explain(at<const void>(packed), bytes, text.data(), length + 1);
  text.resize((size_t)length);
  return text;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  using namespace py::literals;
  const auto free = py::call_guard<py::gil_scoped_release>();

  py::class_<Weight>(m, "Weight")
      .def(py::init(&make_weight), py::kw_only(), "kind"_a, "bits"_a, "activations"_a, "n"_a, "k"_a,
           "group"_a = 0, "codes"_a = 0, "codes_stride"_a = 0, "scales"_a = 0, "scale_dtype"_a = 0,
           "scales_stride"_a = 0, "zeros"_a = 0, "zero_dtype"_a = 0, "zeros_stride"_a = 0,
           "codebook"_a = 0, "table_per"_a = 0, "table_scale"_a = 1.0f, "perm"_a = 0);
  m.def("version", [] { return qk_version(); });
  m.def("packed_bytes", [](const Weight& weight) {
    int64_t bytes = 0;
    check(qk_packed_bytes(&weight.w, &bytes));
    return bytes;
  });
  m.def(
      "pack",
      [](const Weight& weight, Address packed, int64_t bytes) {
        check(qk_pack(&weight.w, at<void>(packed), bytes));
      },
      free);
  m.def("packed_describe", &describe);
  m.def("unpack", &unpack, free);
  m.def("linear", &linear, "packed"_a, "packed_bytes"_a, "x_dtype"_a, "x"_a, "m"_a,
        "x_row_stride"_a, "x_col_stride"_a, "bias"_a, "bias_dtype"_a, "y_dtype"_a, "y"_a,
        "y_row_stride"_a, "kernel"_a = nullptr, "x_columns"_a = -1, "y_columns"_a = -1, free);
  m.def("dequantize", &dequantize, "weight"_a, "packed"_a, "packed_bytes"_a, "out_dtype"_a,
        "rows"_a, "row_begin"_a, "row_count"_a, "out"_a, "out_row_stride"_a, "kernel"_a = nullptr,
        free);
  m.def("quantize_activations", &quantize_activations, "x_dtype"_a, "x"_a, "m"_a, "k"_a, "group"_a,
        "x_row_stride"_a, "x_col_stride"_a, "q"_a, "q_row_stride"_a, "scales"_a,
        "kernel"_a = nullptr, free);

  m.def("kernels", &kernels);
  m.def("explain", &explain);
  m.def("last_kernel", [] { return qk_last_kernel(); });
  m.def("detected_isa", [] { return qk_isa_name(qk_detected_isa()); });
  m.def("active_isa", [] { return qk_isa_name(qk_active_isa()); });
  m.def("set_isa", [](const char* name) {
    if (!name) return check(qk_set_isa(QK_ISA_AUTO));
    for (qk_isa isa = 0; isa < 32; ++isa)
      if (const char* known = qk_isa_name(isa); known && std::string(known) == name)
        return check(qk_set_isa(isa));
    throw py::value_error(
        "no instruction set is called " + std::string(name) +
        "; expected scalar, avx2, avx512, avx512vnni, avx512amx, neon, neondot or "
        "neoni8mm");
  });
  m.def("get_threads", [] { return qk_get_threads(); });
  m.def("set_threads", [](int threads) { check(qk_set_threads(threads)); });
  m.def("use_openmp", [](Address gomp_parallel, Address omp_get_max_threads) {
    check(qk_set_parallel_openmp(at<void>(gomp_parallel), at<void>(omp_get_max_threads)));
  });
  m.def("use_own_threads", [] { check(qk_set_parallel(nullptr)); });
  bind_eager(m);
  bind_fit(m);
  bind_matmul(m);
  bind_layers(m);
}
