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

struct Caches {
  int64_t first_ways = kFewestWays;
  int64_t second_bytes = 512 << 10;  // each core has it for itself
};

// Those of this processor; at least the above.
inline const Caches& caches() {
  static const Caches found = [] {
    Caches c;
#if defined(_SC_LEVEL1_DCACHE_ASSOC) && defined(_SC_LEVEL2_CACHE_SIZE)
    c.first_ways = std::max<int64_t>(c.first_ways, sysconf(_SC_LEVEL1_DCACHE_ASSOC));
    c.second_bytes = std::max<int64_t>(c.second_bytes, sysconf(_SC_LEVEL2_CACHE_SIZE));
#endif
    return c;
  }();
  return found;
}

}  // namespace voxconv
