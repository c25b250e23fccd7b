// The CPU kernels without torch, against plain double-precision oracles, on every instruction set of this CPU.
// tests/packaging/test_cpp.py builds and runs it under AddressSanitizer and UndefinedBehaviorSanitizer.  Inputs have no
// spare elements, and every gap between their elements is NaN, so that a read out of place is either caught or seen.
#include "check.h"

int main() {
  tests::test_groups();
  tests::test_head();
  tests::test_gradients();
  tests::test_large_vocabularies();
  tests::test_options();
  tests::test_support();
  std::printf("%d comparisons on", tests::comparisons);
  for (g2rl::Isa isa : tests::instruction_sets()) std::printf(" %s", g2rl::isa_name(isa));
  std::printf(": %d failures\n", tests::failures);
  return tests::failures != 0;
}
