// SPDX-License-Identifier: Apache-2.0
// Which instruction set the kernels of this process use.
#pragma once

// Whether kernels are compiled for the levels of x86-64, or for the baseline alone.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VOXCONV_X86_LEVELS 1
#else
#define VOXCONV_X86_LEVELS 0
#endif

namespace voxconv {

enum class CpuLevel { baseline, v3, v4 };

// The best one this processor has; VOXCONV_CPU_LEVEL = baseline | x86-64-v3 | x86-64-v4 lowers it.
CpuLevel cpu_level();

}  // namespace voxconv
