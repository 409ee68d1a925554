// SPDX-License-Identifier: Apache-2.0
#include "cuda_build.h"

#include <cuda_runtime_api.h>

#define VOXCONV_TEXT(x) #x
#define VOXCONV_TEXT_OF(x) VOXCONV_TEXT(x)

// setup.py tells VOXCONV_CUDA_ARCH to the files for CUDA alone: the others need not be compiled
// again.
const char* voxconv::cuda_build() {
  return VOXCONV_CUDA_ARCH
      " nvcc " VOXCONV_TEXT_OF(__CUDACC_VER_MAJOR__) "." VOXCONV_TEXT_OF(__CUDACC_VER_MINOR__);
}

int voxconv::cuda_runtime() { return CUDART_VERSION; }

int voxconv::cuda_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
