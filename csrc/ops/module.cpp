// The Python module _C: instruction sets and how it was built. Its import registers the operators (head.cpp, group.cpp).
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <string>

#include "../cpu/isa.h"

namespace {

namespace py = pybind11;

std::string compiler() {
#if defined(__clang__)
  return "clang " + std::string(__clang_version__);
#else
  return "gcc " + std::string(__VERSION__);
#endif
}

// No date and no path: the same sources and tools give the same answer.
py::dict build_info() {
  using namespace py::literals;
  py::object cuda = py::none(), cuda_archs = py::none();
#ifdef WITH_CUDA
  cuda = py::str(G2RL_CUDA);
  cuda_archs = py::str(G2RL_CUDA_ARCHS).attr("split")();
#endif
  const auto target = static_cast<unsigned long long>(TORCH_TARGET_VERSION);
  return py::dict("version"_a = G2RL_VERSION, "torch_built_with"_a = TORCH_VERSION,
                  "torch_target"_a = std::to_string(target >> 56) + "." + std::to_string(target >> 48 & 0xff),
                  "compiler"_a = compiler(), "cxx_standard"_a = static_cast<long>(__cplusplus), "cuda"_a = cuda,
                  "cuda_archs"_a = cuda_archs);
}

}  // namespace

// Free-threaded Python keeps its GIL off: operators share nothing between calls but thread_local workspaces (csrc/cpu/head.cpp,
// logprobs.cpp) and constants initialised once. getenv (G2RL_CPU_ISA) must not meet a setenv of another thread, as in any program.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "g2rl-kernels' compiled part. Its import registers the torch ops of namespace g2rl.";
  py::tuple names(g2rl::kIsaCount);
  for (int i = 0; i < g2rl::kIsaCount; ++i) names[i] = g2rl::isa_name(static_cast<g2rl::Isa>(i));
  m.attr("isa_names") = names;  // lowest first
  m.def("best_isa", [] { return g2rl::isa_name(g2rl::best_isa()); }, "The highest instruction set that this CPU can run.");
  m.def("chosen_isa", [] { return g2rl::isa_name(g2rl::chosen_isa()); },
        "The instruction set that the kernels use: best_isa(), lowered by the environment variable G2RL_CPU_ISA.\n"
        "Raises ValueError if the variable holds an unknown name, or one that this CPU lacks.");
  m.def("build_info", &build_info, "How this module was built: versions, compiler, CUDA (None: built without it).");
}
