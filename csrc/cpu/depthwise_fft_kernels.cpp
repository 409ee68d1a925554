// SPDX-License-Identifier: Apache-2.0
#include "caches.h"
#include "spectral_args.h"

#define VOXCONV_TARGET_FILE "depthwise_fft_kernels.inc"
#include "foreach_target.h"

namespace voxconv {

const SpectralKernels& spectral_kernels(Element element, int64_t pairs) {
  const auto at = static_cast<int>(element);
#if VOXCONV_X86_LEVELS
  // Half of the lanes, where these are enough, is half of the work. Both levels give the same bits.
  const SpectralKernels& narrow = *x86_64_v3::kSpectralTable[at];
  if (cpu_level() == CpuLevel::v4 && pairs <= narrow.lanes) return narrow;
#endif
  return *VOXCONV_OF_LEVEL(kSpectralTable[at]);
}

}  // namespace voxconv
