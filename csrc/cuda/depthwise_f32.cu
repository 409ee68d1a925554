// SPDX-License-Identifier: Apache-2.0
#include "depthwise_passes.cuh"

namespace voxconv {
template struct DepthwisePasses<float>;
}  // namespace voxconv
