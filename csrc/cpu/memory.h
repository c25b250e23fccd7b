// The kernels' scratch memory, in huge pages if the system has them.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace g2rl {

class Workspace {
 public:
  // Memory for at least `bytes`, on a page boundary. Its contents are undefined.
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      data_ = nullptr, size_ = 0;
      void* p = nullptr;
      if (posix_memalign(&p, kHugePage, bytes)) throw std::bad_alloc();
#ifdef __linux__
      if (bytes >= kHugePage) madvise(p, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
      data_ = static_cast<char*>(p), size_ = bytes;
    }
    return data_;
  }
  ~Workspace() { std::free(data_); }

 private:
  static constexpr int64_t kHugePage = 2 << 20;
  char* data_ = nullptr;
  int64_t size_ = 0;
};

// Offsets of several arrays in a workspace, each on a cache line.
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
