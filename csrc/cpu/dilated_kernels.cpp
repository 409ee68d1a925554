// SPDX-License-Identifier: Apache-2.0
#include "caches.h"
#include "dilated_args.h"

#define VOXCONV_TARGET_FILE "dilated_kernels.inc"
#include "foreach_target.h"

namespace voxconv {

const DilatedKernels& dilated_kernels(Element element) {
  return *VOXCONV_OF_LEVEL(kDilatedTable[static_cast<int>(element)]);
}

}  // namespace voxconv
