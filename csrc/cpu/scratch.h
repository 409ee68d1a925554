// SPDX-License-Identifier: Apache-2.0
// Memory from the system, and what kernels work in.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../common/stable.h"

namespace voxconv {

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, FreeMemory>;

constexpr size_t kHugePage = 2 << 20;

// Fresh memory costs a page fault for every 4 KiB, more than many a convolution: ask for huge pages
// where the system leaves that to us.
inline void advise_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

inline Memory allocate(size_t bytes) {
  constexpr size_t kPage = 4096;
  const size_t unit = bytes < 2 * kHugePage ? kPage : kHugePage,
               size = (bytes + unit - 1) / unit * unit;
  Memory memory(std::aligned_alloc(unit, size));
  VOXCONV_CHECK(memory != nullptr, "voxconv: no memory for ", bytes, " bytes");
  if (unit == kHugePage) advise_huge_pages(memory.get(), size);
  return memory;
}

// What a thread works in alone, and what all threads of a parallel_for work in, its caller's.
enum ScratchKind { kOwnScratch, kSharedScratch };

// Per-thread scratch, grown and kept: a fresh allocation costs a page fault for every 4 KiB.
template <ScratchKind kind = kOwnScratch>
void* scratch(size_t bytes) {
  thread_local Memory memory;
  thread_local size_t size = 0;
  if (bytes > size) {
    size = 0;
    memory.reset();
    memory = allocate(bytes);
    size = bytes;
  }
  return memory.get();
}

}  // namespace voxconv
