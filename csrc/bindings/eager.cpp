// SPDX-License-Identifier: Apache-2.0
// qkern._core.eager_linear: one linear call of plain torch tensors without torch's dispatcher.
//
// The dispatcher costs more than a small layer computes. It may be left out when nobody could tell:
// the tensors are plain ones on the CPU, nothing asks for a gradient, and no mode, transform,
// tracer, autocast region or profiler is there to see the operation. All of that is asked of torch
// itself through its Python interface and the DLPack exchange table of torch.Tensor; nothing here
// depends on torch's C++ types. In any other case, and on any error, the answer is None: the caller
// goes the ordinary way, which gives the same bits, or the sentence that belongs to the error.

#include <pybind11/pybind11.h>

#include <algorithm>

#include "qkern/qkern.h"

namespace py = pybind11;

void bind_eager(py::module_& m);

namespace {

// ---- the exchange table of DLPack 1.x, as its specification lays it out ----

struct View {  // DLTensor
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;

  const char* address() const { return static_cast<const char*>(data) + byte_offset; }
};

struct Managed {  // DLManagedTensorVersioned
  uint32_t major, minor;
  void* context;
  void (*deleter)(Managed* self);
  uint64_t flags;
  View view;
};

using SetError = void (*)(void* context, const char* kind, const char* message);

struct Exchange {  // DLPackExchangeAPI
  uint32_t major, minor;
  const void* previous;
  int (*allocate)(const View* like, Managed** out, void* context, SetError set_error);
  const void* from_object;
  int (*to_object)(Managed* owned, void** object);
  int (*view)(void* object, View* out);  // borrowed: valid while the object lives
  const void* stream;
};

constexpr int32_t kCpu = 1;
constexpr uint8_t kUnsigned = 1, kFloat = 2, kBfloat = 4;
constexpr int kAlignment = 64;
constexpr int64_t kShortWork = 1 << 16;  // multiply-adds
constexpr int kMostDimensions = 64;      // of torch

// ---- what torch is asked ----

struct Torch {
  const Exchange* exchange = nullptr;
  PyObject* tensor = nullptr;            // torch.Tensor
  PyObject* parameter = nullptr;         // torch.nn.Parameter
  PyObject* grad_enabled = nullptr;      // torch.is_grad_enabled
  PyObject* function_modes = nullptr;    // whether a TorchFunctionMode is active
  PyObject* autocast = nullptr;          // whether an autocast region is entered
  PyObject* included_keys = nullptr;     // the dispatch keys that this thread adds to every call
  uint64_t ordinary_keys = 0;            // those of them that no one observes
  PyObject* profiler = nullptr;          // globals of torch.autograd.profiler
  PyObject* forward_gradient = nullptr;  // globals of torch.autograd.forward_ad
  PyObject *is_neg, *raw_repr, *requires_grad, *profiler_on, *level;
};

Torch torch;
bool allowed = true;

// The next three answer "no" where Python raised, and clear the error.

bool is_false(PyObject* answer) {
  const bool no = answer == Py_False;
  if (!answer) PyErr_Clear();
  Py_XDECREF(answer);
  return no;
}

bool global_is(PyObject* globals, PyObject* name, long wanted) {
  PyObject* value = PyDict_GetItemWithError(globals, name);  // borrowed
  if (!value) {
    PyErr_Clear();
    return false;
  }
  const long number = PyLong_AsLong(value);
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return number == wanted;
}

bool keys_are_ordinary() {
  PyObject* keys = PyObject_CallNoArgs(torch.included_keys);
  PyObject* number = keys ? PyObject_CallMethodNoArgs(keys, torch.raw_repr) : nullptr;
  Py_XDECREF(keys);
  if (!number) {
    PyErr_Clear();
    return false;
  }
  const uint64_t bits = PyLong_AsUnsignedLongLong(number);
  Py_DECREF(number);
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return (bits & ~torch.ordinary_keys) == 0;
}

bool nobody_watches() {
  return is_false(PyObject_CallNoArgs(torch.function_modes)) &&
         is_false(PyObject_CallNoArgs(torch.autocast)) &&
         global_is(torch.profiler, torch.profiler_on, 0) &&
         global_is(torch.forward_gradient, torch.level, -1) && keys_are_ordinary();
}

// ---- tensors ----

// A dense or strided CPU tensor whose memory holds its numbers as they are.
bool view_of(PyObject* object, View* view) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != torch.tensor && type != torch.parameter) return false;
  if (torch.exchange->view(object, view) != 0) {
    PyErr_Clear();
    return false;
  }
  if (view->device_type != kCpu || view->lanes != 1 || !view->data || !view->strides) return false;
  // The imaginary part of a conjugate is a float tensor whose numbers are yet to be negated.
  return view->code == kUnsigned || is_false(PyObject_CallMethodNoArgs(object, torch.is_neg));
}

bool float_dtype(const View& view, qk_dtype* dtype) {
  if (view.code == kFloat && view.bits == 32) return *dtype = QK_F32, true;
  if (view.code == kFloat && view.bits == 16) return *dtype = QK_F16, true;
  if (view.code == kBfloat && view.bits == 16) return *dtype = QK_BF16, true;
  return false;
}

bool wants_gradient(PyObject* object) {
  return !is_false(PyObject_GetAttr(object, torch.requires_grad));
}

// x [..., K] as [M, K] with one stride between rows.
bool rows_of(const View& x, int64_t* m, int64_t* stride) {
  *m = 1;
  *stride = x.shape[x.ndim - 1];
  for (int i = x.ndim - 2; i >= 0; --i) {
    if (x.shape[i] == 1) continue;
    if (*m == 1)
      *stride = x.strides[i];
    else if (x.strides[i] != *stride * *m)
      return false;
    *m *= x.shape[i];
  }
  return *m > 0;
}

bool set_packed(PyObject* packed, qk_linear_args* a) {
  View view;
  if (!view_of(packed, &view) || view.ndim != 1 || view.code != kUnsigned || view.bits != 8)
    return false;
  if (view.shape[0] > 1 && view.strides[0] != 1) return false;
  a->packed = view.address();
  a->packed_bytes = view.shape[0];
  return reinterpret_cast<uintptr_t>(a->packed) % kAlignment == 0;
}

bool set_bias(PyObject* bias, int64_t n, qk_linear_args* a) {
  if (bias == Py_None) return true;
  View view;
  if (!view_of(bias, &view) || !float_dtype(view, &a->bias_dtype)) return false;
  if (view.ndim != 1 || view.shape[0] != n || (n > 1 && view.strides[0] != 1)) return false;
  a->bias = view.address();
  return true;
}

// An uninitialized dense tensor with the dtype and the leading dimensions of x.
PyObject* new_output(const View& x, int64_t n, qk_linear_args* a) {
  int64_t shape[kMostDimensions];
  std::copy_n(x.shape, x.ndim, shape);
  shape[x.ndim - 1] = n;
  View like = x;
  like.data = nullptr;
  like.shape = shape;
  like.strides = nullptr;
  like.byte_offset = 0;
  Managed* block = nullptr;
  const auto ignore = [](void*, const char*, const char*) {};
  if (torch.exchange->allocate(&like, &block, nullptr, ignore) != 0) return nullptr;
  a->y = const_cast<char*>(block->view.address());
  void* y = nullptr;
  if (torch.exchange->to_object(block, &y) != 0) return nullptr;
  return static_cast<PyObject*>(y);
}

// The result, or null without a Python error where the ordinary way is to be taken.
PyObject* try_linear(PyObject* x_object, PyObject* packed, PyObject* bias, int64_t n) {
  qk_linear_args a = {};
  a.struct_size = sizeof a;
  View x;
  if (!view_of(x_object, &x) || !float_dtype(x, &a.x_dtype)) return nullptr;
  if (x.ndim < 1 || x.ndim > kMostDimensions) return nullptr;
  if (!set_packed(packed, &a) || !set_bias(bias, n, &a) || !nobody_watches()) return nullptr;
  if (!is_false(PyObject_CallNoArgs(torch.grad_enabled)) &&
      (wants_gradient(x_object) || (bias != Py_None && wants_gradient(bias))))
    return nullptr;
  if (!rows_of(x, &a.m, &a.x_row_stride)) return nullptr;
  qk_weight w = {};
  w.struct_size = sizeof w;
  if (qk_packed_describe(a.packed, a.packed_bytes, &w) != QK_OK) return nullptr;
  if (w.n != n || w.k != x.shape[x.ndim - 1]) return nullptr;
  PyObject* y = new_output(x, n, &a);
  if (!y) {
    PyErr_Clear();
    return nullptr;
  }
  a.x = x.address();
  a.x_col_stride = x.strides[x.ndim - 1];
  a.y_dtype = a.x_dtype;
  a.y_row_stride = n;
  // Work of a few microseconds keeps the interpreter: letting it go and taking it back costs more.
  PyThreadState* const thread = a.m * n * w.k > kShortWork ? PyEval_SaveThread() : nullptr;
  const qk_status status = qk_linear(&a);
  if (thread) PyEval_RestoreThread(thread);
  if (status != QK_OK) Py_CLEAR(y);
  return y;
}

PyObject* eager_linear(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4) {
    PyErr_SetString(PyExc_TypeError, "eager_linear takes x, packed, bias and n");
    return nullptr;
  }
  if (torch.exchange && allowed) {
    const long long n = PyLong_AsLongLong(arguments[3]);
    PyErr_Clear();  // a number of another type: the ordinary way
    if (PyObject* y = try_linear(arguments[0], arguments[1], arguments[2], n)) return y;
  }
  Py_RETURN_NONE;
}

PyMethodDef method = {"eager_linear",
                      reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&eager_linear)),
                      METH_FASTCALL, "The result, or None where torch's dispatcher must be asked."};

PyObject* kept(const py::object& object) { return object.inc_ref().ptr(); }

bool setup(const py::object& exchange, const py::object& tensor, const py::object& parameter,
           const py::object& grad_enabled, const py::object& function_modes,
           const py::object& autocast, const py::object& included_keys, uint64_t ordinary_keys,
           const py::dict& profiler, const py::dict& forward_gradient) {
  const void* table = PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api");
  if (!table) throw py::error_already_set();
  const auto* api = static_cast<const Exchange*>(table);
  if (api->major != 1 || !api->view || !api->allocate || !api->to_object) return false;
  torch.tensor = kept(tensor);
  torch.parameter = kept(parameter);
  torch.grad_enabled = kept(grad_enabled);
  torch.function_modes = kept(function_modes);
  torch.autocast = kept(autocast);
  torch.included_keys = kept(included_keys);
  torch.ordinary_keys = ordinary_keys;
  torch.profiler = kept(profiler);
  torch.forward_gradient = kept(forward_gradient);
  torch.is_neg = PyUnicode_InternFromString("is_neg");
  torch.raw_repr = PyUnicode_InternFromString("raw_repr");
  torch.requires_grad = PyUnicode_InternFromString("requires_grad");
  torch.profiler_on = PyUnicode_InternFromString("_is_profiler_enabled");
  torch.level = PyUnicode_InternFromString("_current_level");
  torch.exchange = api;
  return true;
}

}  // namespace

void bind_eager(py::module_& m) {
  using namespace py::literals;
  m.attr("eager_linear") = py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
  m.def("eager_setup", &setup, py::kw_only(), "exchange"_a, "tensor"_a, "parameter"_a,
        "grad_enabled"_a, "function_modes"_a, "autocast"_a, "included_keys"_a, "ordinary_keys"_a,
        "profiler"_a, "forward_gradient"_a);
  m.def("eager_allow", [](bool allow) { allowed = allow; });
}
