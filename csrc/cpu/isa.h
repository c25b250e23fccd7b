// The instruction set that the CPU kernels run with.
#pragma once

namespace g2rl {

// Each level implies the ones before it.
enum class Isa : int {
  plain = 0,       // what the compiler targets without flags
  avx2 = 1,        // AVX2, FMA, F16C
  avx512 = 2,      // AVX-512 F, BW, DQ, VL
  avx512bf16 = 3,  // AVX-512 BF16: dot products of bfloat16
};
constexpr int kIsaCount = 4;

// The highest level that this CPU and operating system can run.
Isa best_isa();

// best_isa(), lowered by the environment variable G2RL_CPU_ISA, read at each call.
// Throws std::invalid_argument for an unknown name or a level that this CPU lacks.
Isa chosen_isa();

const char* isa_name(Isa);

}  // namespace g2rl
