// SPDX-License-Identifier: Apache-2.0
#include "depthwise_args.h"

#include <cstdlib>

#define VOXCONV_TARGET_FILE "depthwise_kernels.inc"
#include "foreach_target.h"

namespace voxconv {
namespace {

struct Level {
  const char* name;
  const DepthwiseKernels* const* kernels;
  bool supported;
};

const Level& level() {
  static const Level chosen = [] {
#if VOXCONV_X86_TARGETS
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
#endif
    const Level levels[] = {
#if VOXCONV_X86_TARGETS
        {"x86-64-v4", x86_64_v4::kKernelTable, v4},
        {"x86-64-v3", x86_64_v3::kKernelTable, v3},
#endif
        {"baseline", baseline::kKernelTable, true},
    };
    const char* wanted = std::getenv("VOXCONV_CPU_LEVEL");
    for (const Level& l : levels)
      if (l.supported && wanted && std::strcmp(wanted, l.name) == 0) return l;
    for (const Level& l : levels)
      if (l.supported) return l;
    return levels[0];
  }();
  return chosen;
}

}  // namespace

const DepthwiseKernels& depthwise_kernels(Element element) {
  return *level().kernels[static_cast<int>(element)];
}

const char* cpu_level() { return level().name; }

}  // namespace voxconv
