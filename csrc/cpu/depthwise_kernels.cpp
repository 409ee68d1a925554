// SPDX-License-Identifier: Apache-2.0
#include "depthwise_args.h"

#define VOXCONV_TARGET_FILE "depthwise_kernels.inc"
#include "foreach_target.h"

namespace voxconv {

const DepthwiseKernels& depthwise_kernels(Element element) {
  return *VOXCONV_OF_LEVEL(kKernelTable[static_cast<int>(element)]);
}

}  // namespace voxconv
