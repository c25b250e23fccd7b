// torch's current CUDA stream, for a module that also loads with a torch without CUDA.
#pragma once
#include <dlfcn.h>

#include <cstdint>

namespace g2rl {

using CurrentStream = int32_t (*)(int32_t device, void** stream);  // aoti_torch_get_current_cuda_stream; 0 is success

// Null if this torch has no CUDA. A weak reference fails, as the linker drops a library that is only weakly referred to; a
// search of the global scope fails, as torch opens libtorch_cuda with RTLD_LOCAL.
inline CurrentStream current_cuda_stream() {
  static const CurrentStream found = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);  // only if it is loaded
    void* symbol = torch_cuda ? dlsym(torch_cuda, name) : nullptr;
    if (!symbol) symbol = dlsym(RTLD_DEFAULT, name);  // a torch in one piece
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  return found;
}

}  // namespace g2rl
