// torch's current CUDA stream, for a module that has to load beside a torch without CUDA too.
#pragma once
#include <dlfcn.h>

#include <cstdint>

namespace g2rl {

using CurrentStream = int32_t (*)(int32_t device, void** stream);  // aoti_torch_get_current_cuda_stream; 0 is success

// Null where this torch has no CUDA. Neither a weak reference nor the global scope would do: torch opens libtorch_cuda for itself
// alone, and the linker drops a library that is only weakly referred to.
inline CurrentStream current_cuda_stream() {
  static const CurrentStream found = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);  // the one that is there, if any
    void* symbol = torch_cuda ? dlsym(torch_cuda, name) : nullptr;
    if (!symbol) symbol = dlsym(RTLD_DEFAULT, name);  // a torch in one piece
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  return found;
}

}  // namespace g2rl
