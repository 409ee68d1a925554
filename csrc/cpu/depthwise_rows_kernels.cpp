// SPDX-License-Identifier: Apache-2.0
#include "depthwise_args.h"

#define VOXCONV_TARGET_FILE "depthwise_rows_kernels.inc"
#include "foreach_target.h"

namespace voxconv {

const RowsKernels& rows_kernels(Element element) {
  return *VOXCONV_OF_LEVEL(kRowsTable[static_cast<int>(element)]);
}

}  // namespace voxconv
