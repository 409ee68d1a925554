// SPDX-License-Identifier: Apache-2.0
// Memory that must not be left: pages that may not be touched lie before it and behind it.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>

namespace cuda_on_cpu {

// What memory holds that nobody has written: NaNs, or numbers that are far too large, for kernels
// that look again at what is NaN. As bytes.
constexpr int kNan = 0xff, kLarge = 0x5a;

class Guarded {
 public:
  // `bytes` bytes that end, to the next 16, at a page that may not be touched: a copy of `from`,
  // or `fill`.
  Guarded(const void* from, size_t bytes, int fill = kNan) {
    const size_t page = sysconf(_SC_PAGESIZE), used = (bytes + page - 1) / page * page;
    size_ = used + 2 * page;
    base_ = static_cast<char*>(
        mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(base_ + page, used, PROT_READ | PROT_WRITE);
    data_ = base_ + page + used - (bytes + 15) / 16 * 16;
    if (from)
      std::memcpy(data_, from, bytes);
    else
      std::memset(data_, fill, bytes);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, size_); }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char *base_, *data_;
  size_t size_;
};

}  // namespace cuda_on_cpu
