// SPDX-License-Identifier: Apache-2.0
// The caches of this processor.
#pragma once
#include <algorithm>
#include <cstdint>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace voxconv {

constexpr int64_t kLineBytes = 64;
// Cells this far apart compete for the same lines of the first cache, which holds as many of them
// as it has ways: at least that many.
constexpr int64_t kWayBytes = 4096, kFewestWays = 8;

inline int64_t first_cache_ways() {
#if defined(_SC_LEVEL1_DCACHE_ASSOC)
  static const int64_t ways = sysconf(_SC_LEVEL1_DCACHE_ASSOC);
  return std::max(ways, kFewestWays);
#else
  return kFewestWays;
#endif
}

// Of the second cache, which each core has for itself; at least that many.
inline int64_t second_cache_bytes() {
  constexpr int64_t kFewest = 512 << 10;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return std::max(bytes, kFewest);
#else
  return kFewest;
#endif
}

}  // namespace voxconv
