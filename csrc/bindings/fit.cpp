// SPDX-License-Identifier: Apache-2.0
// Codes and fitting. Arrays come as addresses (0: absent) with sizes and strides; the callers in
// Python have made sure of dtypes and keep the arrays alive.
#include <cstdint>

#include "check.h"

namespace qkern::python {
namespace {

namespace py = pybind11;
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class Call>
void without_gil(const Call& call) {
  qk_status status;
  {
    py::gil_scoped_release release;
    status = call();
  }
  check(status);
}

void codes_pack(Address codes, int64_t n, int64_t k, int64_t codes_stride, int32_t bits,
                Address stream, int64_t stream_stride_bytes) {
  without_gil([&] {
    return qk_codes_pack(at<const uint8_t>(codes), n, k, codes_stride, bits, at<uint8_t>(stream),
                         stream_stride_bytes);
  });
}

void codes_unpack(Address stream, int64_t n, int64_t k, int64_t stream_stride_bytes, int32_t bits,
                  Address codes, int64_t codes_stride) {
  without_gil([&] {
    return qk_codes_unpack(at<const uint8_t>(stream), n, k, stream_stride_bytes, bits,
                           at<uint8_t>(codes), codes_stride);
  });
}

void fit_rtn(Address w, int64_t n, int64_t k, int64_t w_stride, int32_t bits, int64_t group,
             bool symmetric, qk_dtype scale_dtype, Address codes, int64_t codes_stride_bytes,
             Address scales, Address zeros) {
  qk_fit_rtn_args args = {};
  args.struct_size = sizeof args;
  args.bits = bits;
  args.w = at<const float>(w);
  args.n = n;
  args.k = k;
  args.w_stride = w_stride;
  args.group = group;
  args.symmetric = symmetric;
  args.scale_dtype = scale_dtype;
  args.codes = at<uint8_t>(codes);
  args.codes_stride_bytes = codes_stride_bytes;
  args.scales = at<void>(scales);
  args.zeros = at<uint8_t>(zeros);
  without_gil([&] { return qk_fit_rtn(&args); });
}

void fit_table(Address w, int64_t n, int64_t k, int64_t w_stride, int32_t bits, int64_t group,
               Address scales, Address codebook, qk_table_per table_per, Address codes,
               int64_t codes_stride_bytes) {
  qk_fit_table_args args = {};
  args.struct_size = sizeof args;
  args.bits = bits;
  args.w = at<const float>(w);
  args.n = n;
  args.k = k;
  args.w_stride = w_stride;
  args.group = group;
  args.scales = at<const float>(scales);
  args.codebook = at<const float>(codebook);
  args.table_per = table_per;
  args.codes = at<uint8_t>(codes);
  args.codes_stride_bytes = codes_stride_bytes;
  without_gil([&] { return qk_fit_table(&args); });
}

void fit_kmeans(Address w, int64_t n, int64_t k, int64_t w_stride, int32_t bits,
                qk_table_per table_per, int64_t group, Address importance,
                int64_t importance_row_stride, Address codebook, Address codes,
                int64_t codes_stride_bytes, Address errors) {
  qk_fit_kmeans_args args = {};
  args.struct_size = sizeof args;
  args.bits = bits;
  args.w = at<const float>(w);
  args.n = n;
  args.k = k;
  args.w_stride = w_stride;
  args.table_per = table_per;
  args.group = group;
  args.importance = at<const float>(importance);
  args.importance_row_stride = importance_row_stride;
  args.codebook = at<float>(codebook);
  args.codes = at<uint8_t>(codes);
  args.codes_stride_bytes = codes_stride_bytes;
  args.errors = at<double>(errors);
  without_gil([&] { return qk_fit_kmeans(&args); });
}

void fit_tiles(Address w, int64_t n, int64_t k, int64_t w_stride, qk_activations activations,
               Address importance, int64_t importance_row_stride, Address codebook, Address codes,
               int64_t codes_stride_bytes, Address errors) {
  qk_fit_tiles_args args = {};
  args.struct_size = sizeof args;
  args.activations = activations;
  args.w = at<const float>(w);
  args.n = n;
  args.k = k;
  args.w_stride = w_stride;
  args.importance = at<const float>(importance);
  args.importance_row_stride = importance_row_stride;
  args.codebook = at<uint8_t>(codebook);
  args.codes = at<uint8_t>(codes);
  args.codes_stride_bytes = codes_stride_bytes;
  args.errors = at<double>(errors);
  without_gil([&] { return qk_fit_tiles(&args); });
}

}  // namespace

}  // namespace qkern::python

void bind_fit(pybind11::module_& module) {
  using namespace qkern::python;
  using pybind11::arg;
  module.def("codes_pack", &codes_pack, arg("codes"), arg("n"), arg("k"), arg("codes_stride"),
             arg("bits"), arg("stream"), arg("stream_stride_bytes"),
             "One byte per code to the dense bit stream.");
  module.def("codes_unpack", &codes_unpack, arg("stream"), arg("n"), arg("k"),
             arg("stream_stride_bytes"), arg("bits"), arg("codes"), arg("codes_stride"),
             "The dense bit stream to one byte per code.");
  module.def("fit_rtn", &fit_rtn, arg("w"), arg("n"), arg("k"), arg("w_stride"), arg("bits"),
             arg("group"), arg("symmetric"), arg("scale_dtype"), arg("codes"),
             arg("codes_stride_bytes"), arg("scales"), arg("zeros") = 0,
             "Round to nearest on a uniform grid per row and group.");
  module.def("fit_table", &fit_table, arg("w"), arg("n"), arg("k"), arg("w_stride"), arg("bits"),
             arg("group"), arg("scales"), arg("codebook"), arg("table_per"), arg("codes"),
             arg("codes_stride_bytes"), "Codes of the nearest entry of a given table.");
  module.def("fit_kmeans", &fit_kmeans, arg("w"), arg("n"), arg("k"), arg("w_stride"), arg("bits"),
             arg("table_per"), arg("group"), arg("importance"), arg("importance_row_stride"),
             arg("codebook"), arg("codes"), arg("codes_stride_bytes"), arg("errors") = 0,
             "Exact optimal k-means tables and codes.");
  module.def("fit_tiles", &fit_tiles, arg("w"), arg("n"), arg("k"), arg("w_stride"),
             arg("activations"), arg("importance"), arg("importance_row_stride"), arg("codebook"),
             arg("codes"), arg("codes_stride_bytes"), arg("errors") = 0,
             "The best table of 8 float8 numbers for each tile of 8 x 64, and codes.");
}
