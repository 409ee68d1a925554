// SPDX-License-Identifier: Apache-2.0
#include "result_memory.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "scratch.h"

#if defined(__linux__)
#include <unistd.h>
#endif

namespace voxconv {
namespace {

constexpr size_t kMiB = 1 << 20;
constexpr size_t kLeastBytes = 32 * kMiB;  // glibc: DEFAULT_MMAP_THRESHOLD_MAX
constexpr size_t kMostBlocks = 64;

#if defined(__linux__) && defined(MADV_FREE)

// VOXCONV_CACHE_MIB, or an eighth of the machine's memory.
size_t most_kept_bytes() {
  if (const char* wanted = std::getenv("VOXCONV_CACHE_MIB"); wanted && *wanted) {
    char* end;
    const unsigned long long mib = std::strtoull(wanted, &end, 10);
    if (*end == '\0' && *wanted != '-') return mib < SIZE_MAX / kMiB ? mib * kMiB : SIZE_MAX;
  }
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  return pages > 0 && page > 0 ? static_cast<size_t>(pages) * page / 8 : 0;
}

struct Block {
  Memory memory;
  size_t bytes;
};

// Blocks that no tensor uses. MADV_FREE lets the system take their pages back when it runs short;
// until then they cost nothing to use again. The lock is only ever tried: a child of fork() may
// find it held by a thread that it does not have.
class KeptBlocks {
 public:
  size_t limit() const { return limit_; }

  // The block that was freed last of those that fit without wasting a fifth; else a new one.
  Block take(size_t bytes) {
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      for (size_t i = blocks_.size(); i-- > 0;) {
        if (blocks_[i].bytes < bytes || blocks_[i].bytes > bytes + bytes / 4) continue;
        Block block = std::move(blocks_[i]);
        blocks_.erase(blocks_.begin() + i);
        kept_ -= block.bytes;
        return block;
      }
    }
    return {allocate(bytes), bytes};
  }

  void give_back(Block block) {
    madvise(block.memory.get(), block.bytes, MADV_FREE);
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return;
    kept_ += block.bytes;
    blocks_.push_back(std::move(block));
    while (kept_ > limit_ || blocks_.size() > kMostBlocks) {
      kept_ -= blocks_.front().bytes;
      blocks_.erase(blocks_.begin());
    }
  }

  void clear() {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return;
    blocks_.clear();
    kept_ = 0;
  }

 private:
  const size_t limit_ = most_kept_bytes();
  std::mutex mutex_;
  std::vector<Block> blocks_;  // in the order in which they were freed
  size_t kept_ = 0;
};

// Never destroyed: tensors may outlive static objects.
KeptBlocks& kept_blocks() {
  static KeptBlocks* const blocks = new KeptBlocks;
  return *blocks;
}

void give_back(void* memory, void* bytes) {
  kept_blocks().give_back({Memory(memory), reinterpret_cast<size_t>(bytes)});
}

void clear() { kept_blocks().clear(); }

bool keeps(size_t bytes) {
  return bytes >= kLeastBytes && find_from_blob() && bytes <= kept_blocks().limit();
}

Tensor result_in_kept_memory(const Layout5d& layout, size_t bytes) {
  Block block = kept_blocks().take(bytes);
  Tensor result = tensor_in(find_from_blob(), block.memory.get(), layout, give_back,
                            reinterpret_cast<void*>(block.bytes));
  block.memory.release();  // the tensor's
  return result;
}

#else

void clear() {}

bool keeps(size_t) { return false; }

Tensor result_in_kept_memory(const Layout5d& layout, size_t) { return empty_5d(layout); }

#endif

}  // namespace

Tensor empty_result(const Tensor& like, const std::array<int64_t, 5>& sizes) {
  const Layout5d layout(like, sizes, is_channels_last_3d(like));
  size_t bytes = like.element_size();
  for (int64_t size : sizes) bytes *= static_cast<size_t>(size);
  if (keeps(bytes)) return result_in_kept_memory(layout, bytes);
  Tensor result = empty_5d(layout);
  advise_huge_pages(result.mutable_data_ptr(), bytes);
  return result;
}

void empty_result_cache() { clear(); }

}  // namespace voxconv
