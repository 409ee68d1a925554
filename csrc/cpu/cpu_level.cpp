// SPDX-License-Identifier: Apache-2.0
#include "cpu_level.h"

#include <cstdlib>
#include <cstring>

namespace voxconv {

CpuLevel cpu_level() {
  static const CpuLevel chosen = [] {
    struct {
      const char* name;
      CpuLevel level;
      bool supported;
    } levels[] = {{"x86-64-v4", CpuLevel::v4, false},
                  {"x86-64-v3", CpuLevel::v3, false},
                  {"baseline", CpuLevel::baseline, true}};
#if VOXCONV_X86_LEVELS
    __builtin_cpu_init();
    levels[1].supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    levels[0].supported = levels[1].supported && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512cd") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    const char* wanted = std::getenv("VOXCONV_CPU_LEVEL");
    for (const auto& l : levels)
      if (l.supported && wanted && std::strcmp(wanted, l.name) == 0) return l.level;
    for (const auto& l : levels)
      if (l.supported) return l.level;
    return CpuLevel::baseline;
  }();
  return chosen;
}

}  // namespace voxconv
