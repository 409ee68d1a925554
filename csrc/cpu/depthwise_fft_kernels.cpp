// SPDX-License-Identifier: Apache-2.0
#include "spectral_args.h"

#define VOXCONV_TARGET_FILE "depthwise_fft_kernels.inc"
#include "foreach_target.h"

namespace voxconv {

const SpectralKernels& spectral_kernels(Element element, int64_t pairs) {
  const auto at = static_cast<int>(element);
#if VOXCONV_X86_TARGETS
  // Half of the lanes, where these are enough, is half of the work. Both levels give the same bits.
  const SpectralKernels& narrow = *x86_64_v3::kSpectralTable[at];
  static const bool v4 = std::strcmp(cpu_level(), "x86-64-v4") == 0;
  if (v4 && pairs > narrow.lanes) return *x86_64_v4::kSpectralTable[at];
  static const bool v3 = v4 || std::strcmp(cpu_level(), "x86-64-v3") == 0;
  if (v3) return narrow;
#endif
  return *baseline::kSpectralTable[at];
}

}  // namespace voxconv
