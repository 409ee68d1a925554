// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace voxconv {

// What the CUDA kernels were compiled for and by, "80;90a;100+PTX nvcc 13.0".
const char* cuda_build();

}  // namespace voxconv
