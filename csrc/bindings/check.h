// SPDX-License-Identifier: Apache-2.0
// From a qk_status to the Python exception that stands for it.
#pragma once

#include <pybind11/pybind11.h>

#include "qkern/qkern.h"

namespace qkern::python {

[[noreturn]] inline void raise_own(const char* name, const char* message) {
  const pybind11::object type = pybind11::module_::import("qkern.errors").attr(name);
  PyErr_SetString(type.ptr(), message);
  throw pybind11::error_already_set();
}

// Raises unless `status` is QK_OK. Must run on the thread of the call, with the GIL or without it.
inline void check(qk_status status) {
  if (status == QK_OK) return;
  const pybind11::gil_scoped_acquire gil;
  switch (status) {
    case QK_INVALID_ARGUMENT:
      throw pybind11::value_error(qk_last_error());
    case QK_UNSUPPORTED:
      raise_own("UnsupportedError", qk_last_error());
    case QK_BAD_FORMAT:
      raise_own("FormatError", qk_last_error());
    case QK_OUT_OF_MEMORY:
      PyErr_SetString(PyExc_MemoryError, qk_last_error());
      throw pybind11::error_already_set();
    default:
      raise_own("QkernError", qk_last_error());
  }
}

}  // namespace qkern::python
