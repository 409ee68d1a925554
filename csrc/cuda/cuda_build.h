// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace voxconv {

// What the CUDA kernels were compiled for and by, "80;90a;100+PTX nvcc 13.0".
const char* cuda_build();

// CUDA's version, 13000 for 13.0: of the runtime that is linked in, and the latest that the driver
// of this machine knows, or 0 without one.
int cuda_runtime();
int cuda_driver();

}  // namespace voxconv
