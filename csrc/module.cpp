// SPDX-License-Identifier: Apache-2.0
// An empty Python module: importing voxconv._C loads the library, whose static initialisers
// register the kernels with torch (STABLE_TORCH_LIBRARY_IMPL in csrc/*/<op>).
#include <Python.h>

extern "C"
#ifndef _WIN32
    __attribute__((visibility("default")))
#endif
    PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
