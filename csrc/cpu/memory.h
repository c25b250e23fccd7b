// Memory in huge pages where the system has them: the first touch of ordinary ones costs more than filling them.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace g2rl {

constexpr int64_t kHugePage = 2 << 20;

// For the whole huge pages inside of memory that was not touched yet.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  const int64_t skip = -reinterpret_cast<intptr_t>(data) & (kHugePage - 1), whole = (bytes - skip) / kHugePage * kHugePage;
  if (whole > 0) madvise(static_cast<char*>(data) + skip, whole, MADV_HUGEPAGE);
#endif
}

class Workspace {
 public:
  // Memory for at least `bytes`, on a page boundary; what an earlier call left there may still be in it.
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      data_ = nullptr, size_ = 0;
      void* p = nullptr;
      if (posix_memalign(&p, kHugePage, bytes)) throw std::bad_alloc();
      prefer_huge_pages(p, bytes);
      data_ = static_cast<char*>(p), size_ = bytes;
    }
    return data_;
  }
  ~Workspace() { std::free(data_); }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;
};

// Hands out the parts of a workspace, each on a cache line: sizes first, then addresses.
class Layout {
 public:
  int64_t place(int64_t bytes) {  // -> offset
    const int64_t at = bytes_;
    bytes_ += (bytes + 63) / 64 * 64;
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

}  // namespace g2rl
