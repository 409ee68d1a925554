// SPDX-License-Identifier: Apache-2.0
#include "depthwise_passes.cuh"

namespace voxconv {
template struct DepthwisePasses<device::Bf16>;
}  // namespace voxconv
