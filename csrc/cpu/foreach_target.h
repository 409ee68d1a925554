// SPDX-License-Identifier: Apache-2.0
// Includes VOXCONV_TARGET_FILE once per instruction set, each time in a namespace of its own.
// target_clones would be shorter, but GCC lowers vector types in inlined helpers before it clones.
// The file must ask VOXCONV_VECTOR_BYTES, not __AVX512F__ and the like: g++ reads a whole source
// before it obeys the pragmas, and knows none of those.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu_level.h"
#include "half.h"

#if VOXCONV_X86_LEVELS
#include <immintrin.h>
#endif

namespace voxconv {

#if VOXCONV_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace x86_64_v4 {
#define VOXCONV_VECTOR_BYTES 64
constexpr int kVectorBytes = 64, kRegisters = 32;
#include VOXCONV_TARGET_FILE
#undef VOXCONV_VECTOR_BYTES
}  // namespace x86_64_v4
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace x86_64_v3 {
#define VOXCONV_VECTOR_BYTES 32
constexpr int kVectorBytes = 32, kRegisters = 16;
#include VOXCONV_TARGET_FILE
#undef VOXCONV_VECTOR_BYTES
}  // namespace x86_64_v3
#pragma GCC pop_options
#endif

namespace baseline {
#define VOXCONV_VECTOR_BYTES 16
constexpr int kVectorBytes = 16, kRegisters = 16;
#include VOXCONV_TARGET_FILE
#undef VOXCONV_VECTOR_BYTES
}  // namespace baseline

}  // namespace voxconv

// `name`, defined by the file, of the level in use.
#if VOXCONV_X86_LEVELS
#define VOXCONV_OF_LEVEL(name)                     \
  (cpu_level() == CpuLevel::v4   ? x86_64_v4::name \
   : cpu_level() == CpuLevel::v3 ? x86_64_v3::name \
                                 : baseline::name)
#else
#define VOXCONV_OF_LEVEL(name) baseline::name
#endif
