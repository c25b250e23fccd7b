// Detection of the instruction set, and the choice by G2RL_CPU_ISA.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace g2rl {

namespace {

Isa detect() {
#if defined(__x86_64__)
  // __builtin_cpu_supports asks the operating system too (XGETBV: are the wide registers saved?).
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  // Some compilers' builtin does not know f16c. Its registers are those of AVX, checked below.
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  if (!(f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return Isa::plain;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
    return Isa::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
#else
  return Isa::plain;
#endif
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::plain: return "plain";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512bf16: return "avx512bf16";
  }
  return "unknown";
}

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa chosen_isa() {
  const char* wanted = std::getenv("G2RL_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best_isa();
  std::string names;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (std::string(wanted) == isa_name(isa)) {
      if (isa <= best_isa()) return isa;
      throw std::invalid_argument(std::string("G2RL_CPU_ISA=") + wanted + ": this CPU has at most " + isa_name(best_isa()) +
                                  "; unset the variable or lower it");
    }
    names += std::string(i ? ", " : "") + isa_name(isa);
  }
  throw std::invalid_argument(std::string("G2RL_CPU_ISA=") + wanted + ": no such instruction set; one of " + names +
                              ", or unset the variable");
}

}  // namespace g2rl
