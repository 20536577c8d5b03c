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

// Must run on the thread of the call, with the GIL or without it.
[[noreturn]] inline void raise_status(qk_status status, const char* message) {
  const pybind11::gil_scoped_acquire gil;
  switch (status) {
    case QK_INVALID_ARGUMENT:
      throw pybind11::value_error(message);
    case QK_UNSUPPORTED:
      raise_own("UnsupportedError", message);
    case QK_BAD_FORMAT:
      raise_own("FormatError", message);
    case QK_OUT_OF_MEMORY:
      PyErr_SetString(PyExc_MemoryError, message);
      throw pybind11::error_already_set();
    default:
      raise_own("QkernError", message);
  }
}

// Raises unless `status` is QK_OK.
inline void check(qk_status status) {
  if (status != QK_OK) raise_status(status, qk_last_error());
}

}  // namespace qkern::python
