// SPDX-License-Identifier: Apache-2.0
// The Python module voxconv._C. Importing it loads the library, whose static initialisers register
// the kernels with torch (STABLE_TORCH_LIBRARY_IMPL in csrc/*/<op>).
#include <Python.h>

#include "cpu/result_memory.h"
#include "cuda/cuda_build.h"

namespace {

PyObject* empty_cache(PyObject*, PyObject*) {
  voxconv::empty_result_cache();
  Py_RETURN_NONE;
}

// None without CUDA.
PyObject* cuda_build(PyObject*, PyObject*) {
#if defined(USE_CUDA)
  return PyUnicode_FromString(voxconv::cuda_build());
#else
  Py_RETURN_NONE;
#endif
}

// (linked runtime, driver), both 0 without CUDA.
PyObject* cuda_versions(PyObject*, PyObject*) {
#if defined(USE_CUDA)
  return Py_BuildValue("ii", voxconv::cuda_runtime(), voxconv::cuda_driver());
#else
  return Py_BuildValue("ii", 0, 0);
#endif
}

}  // namespace

extern "C"
#ifndef _WIN32
    __attribute__((visibility("default")))
#endif
    PyObject* PyInit__C(void) {
  static PyMethodDef methods[] = {{"empty_cache", empty_cache, METH_NOARGS, nullptr},
                                  {"cuda_build", cuda_build, METH_NOARGS, nullptr},
                                  {"cuda_versions", cuda_versions, METH_NOARGS, nullptr},
                                  {}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
  return PyModule_Create(&module);
}
