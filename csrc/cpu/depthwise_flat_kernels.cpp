// SPDX-License-Identifier: Apache-2.0
#include "caches.h"
#include "depthwise_flat_args.h"

#define VOXCONV_TARGET_FILE "depthwise_flat_kernels.inc"
#include "foreach_target.h"

namespace voxconv {

const FlatKernels& flat_kernels(Element element) {
  return *VOXCONV_OF_LEVEL(kFlatTable[static_cast<int>(element)]);
}

}  // namespace voxconv
