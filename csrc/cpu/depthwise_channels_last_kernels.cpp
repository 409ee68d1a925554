// SPDX-License-Identifier: Apache-2.0
#include "caches.h"
#include "depthwise_args.h"

#define VOXCONV_TARGET_FILE "depthwise_channels_last_kernels.inc"
#include "foreach_target.h"

namespace voxconv {

const DepthwiseKernels* channels_last_kernels(Element element) {
  return element == Element::f32 ? VOXCONV_OF_LEVEL(kChannelsLast) : nullptr;
}

}  // namespace voxconv
