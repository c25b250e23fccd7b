// The backward pass of linear_logprobs on the CPU: the dataflow.  The arithmetic is in head_kernels_impl.h.
//
// With dz the gradient of the logits, N x V, never held: sum_hidden += dz W and grad_weight = dz^T hidden.  The vocabulary is
// worked on in strips of up to 1536 entries, a strip's tokens in chunks of up to 1024:
//
//   gradient  each block of 96 entries x 64 tokens: logits anew, p, dz; kept twice, as rows of entries and rows of tokens,
//             in bf16 where the inputs are (its products take pairs of bf16), else in float32
//   hidden    sum_hidden[tokens, a slice of columns] += dz W, the strip's sum in registers
//   weight    grad_weight[a block, some slices] = dz^T hidden, likewise; over several chunks in float32, rounded last
//
// All three are one register tile (product_tile): rows of numbers against a packed operand.  The packed operands are hidden^T
// for the logits, and W and hidden in slices of 64 columns; packing costs a few percent of the products that use it.
//
// Every number is summed in an order fixed by the shapes alone: the same bits for any number of threads.  bf16 dz is rounded
// once from float32, as a gradient that is handed on in bf16 would be; 1 - p does not cancel, see g2rl_kernels/logprobs.py.
#include "logprobs.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "head_kernels.h"
#include "memory.h"
#include "tasks.h"

namespace g2rl {
namespace {

constexpr int64_t kStrip = 16 * kBlock, kChunk = 16 * kMaxWidth;
constexpr int64_t kSlices = 8;  // of the columns of grad_weight, written together
constexpr int64_t kMemory = 40 << 20;  // bytes, of all that grows with the shapes

// Kept for the thread's next call: fresh pages can cost more than what is done with them.
thread_local Workspace workspace;

class Sweep {
 public:
  Sweep(const SweepArgs& args, const HeadKernels& kernels, Parallel parallel) : a(args), h(args.head), k(kernels), parallel(parallel) {
    base.args = &h;
    base.bf16_pairs = h.dtype == DType::bf16 && k.bf16_dot;
    base.units = base.bf16_pairs ? (h.d + 1) / 2 : h.d;
    size = base.bf16_pairs ? 2 : 4;
    columns = k.panel_for(kMaxWidth);
    slices = ceil_div(h.d, columns);
    // The strip's weight takes a third of the memory at most, where that is a block at least; tokens share the rest.
    const int64_t width = slices * columns, entry = width * size + (a.grad_weight ? width * 4 : 0);
    strip = std::clamp(kMemory / 3 / entry / kBlock * kBlock, kBlock, kStrip);
    const int64_t token = 2 * width * size + 2 * strip * size;
    chunk = std::clamp((kMemory - strip * entry) / token / kMaxWidth * kMaxWidth, kMaxWidth, kChunk);
    chunk = std::min(chunk, ceil_div(h.N, kMaxWidth) * kMaxWidth);

    token_bytes = strip * size;
    Layout layout;
    const int64_t transposed_at = layout.place(chunk * base.units * 4), entries_at = layout.place(strip * chunk * size);
    const int64_t tokens_at = layout.place(a.sum_hidden ? (chunk + kProductRows) * token_bytes : 0);
    const int64_t weights_at = layout.place(a.sum_hidden ? strip * width * size : 0);
    const int64_t hiddens_at = layout.place(a.grad_weight ? chunk * width * size : 0);
    several_chunks = chunk < h.N;
    const int64_t sum_at = layout.place(a.grad_weight && several_chunks ? strip * width * 4 : 0);
    char* memory = workspace.reserve(layout.bytes());
    transposed = reinterpret_cast<float*>(memory + transposed_at);
    by_entry = memory + entries_at;
    by_token = memory + tokens_at;
    weights = reinterpret_cast<float*>(memory + weights_at);
    hiddens = reinterpret_cast<float*>(memory + hiddens_at);
    sum_weight = reinterpret_cast<float*>(memory + sum_at);
    terms.resize(5 * chunk);
    if (a.grad_bias) sum_entries.resize(strip * (chunk / kMaxWidth));
  }

  void run_all() {
    for (v0 = a.begin; v0 < a.end; v0 += strip) {
      entries = std::min(strip, a.end - v0);
      for (int64_t n = 0; n < h.N; n += chunk) {
        if (n != first || groups.empty()) take_chunk(n);
        gradients();
        products();
      }
    }
  }

 private:
  // Groups of 64 tokens with their terms; what of hidden the products need, packed.
  void take_chunk(int64_t n) {
    first = n;
    tokens = std::min(chunk, h.N - n);
    groups.clear();
    for (int64_t t = 0; t < tokens; t += kMaxWidth) {
      HeadChunk c = base;
      c.first_token = n + t;
      c.tokens = std::min(kMaxWidth, tokens - t);
      const int64_t width = fitting_width(c.tokens);
      c.panel = k.panel_for(width);
      c.panels = width / c.panel;
      c.packed = transposed + t * base.units;
      groups.push_back(c);
    }
    padded = (groups.size() - 1) * kMaxWidth + groups.back().panel * groups.back().panels;
    for (int64_t t = 0; t < padded; t++) {
      const bool real = t < tokens;
      for (int64_t i = 0; i < 2; i++) terms[i * chunk + t] = real ? a.normaliser[i * h.N + n + t] : 1e30f;  // p = 0
      for (int64_t i = 0; i < 3; i++) terms[(2 + i) * chunk + t] = real ? a.terms[i * h.N + n + t] : 0.0f;
    }
    run(parallel, groups.size(), [&](int64_t g) {
      const HeadChunk& c = groups[g];
      for (int64_t p = 0; p < c.panels; p++) k.pack(c, p, 0, c.units);
      if (!a.grad_weight) return;
      const int64_t at = units(g * kMaxWidth), used = units(c.tokens), all = units(c.panel * c.panels);
      k.pack_rows(c, h.hidden, c.first_token, c.tokens, hiddens + at * columns, units(padded) * columns);
      for (int64_t j = 0; j < slices; j++)
        std::memset(hiddens + (j * units(padded) + at + used) * columns, 0, 4 * (all - used) * columns);
    });
  }

  // How many units so many rows are, packed
  int64_t units(int64_t rows) const { return base.bf16_pairs ? (rows + 1) / 2 : rows; }

  void gradients() {
    const int64_t count = groups.size(), blocks = ceil_div(entries, kBlock);
    run(parallel, blocks * count, [&](int64_t i) {
      const int64_t b = i / count, g = i % count, v = b * kBlock, n = std::min(kBlock, entries - v), t = g * kMaxWidth;
      GradientBlock block{};
      block.chunk = &groups[g];
      const float** of_tokens[] = {&block.top, &block.log_total, &block.a, &block.e, &block.own};
      for (int64_t j = 0; j < 5; j++) *of_tokens[j] = terms.data() + j * chunk + t;
      block.factor = h.logit_scale / h.temperature;
      block.entry_bytes = chunk * size;
      block.by_entry = by_entry + v * block.entry_bytes + t * size;
      block.token_bytes = token_bytes;
      if (a.sum_hidden) block.by_token = by_token + t * token_bytes + v * size;
      if (a.grad_bias) block.sum_entries = sum_entries.data() + g * strip + v;
      k.gradient(block, v0 + v, n);
      // after that: the block is in cache now, and gradient() fetches it ahead, which packing does not
      if (a.sum_hidden && g == 0) k.pack_rows(base, h.weight, v0 + v, n, weights + units(v) * columns, units(entries) * columns);
    });
  }

  void products() {
    const int64_t rows = kProductRows * 16, pieces = ceil_div(tokens, rows), blocks = ceil_div(entries, kBlock);
    const int64_t of_hidden = a.sum_hidden ? slices * pieces : 0, of_weight = a.grad_weight ? ceil_div(slices, kSlices) * blocks : 0;
    run(parallel, of_hidden + of_weight, [&](int64_t i) {
      if (i < of_hidden) hidden_product(i / pieces, i % pieces * rows, std::min(rows, tokens - i % pieces * rows));
      else weight_product((i - of_hidden) / blocks, (i - of_hidden) % blocks * kBlock);
    });
    if (a.grad_bias)
      for (int64_t g = 0; g < int64_t(groups.size()); g++)
        for (int64_t v = 0; v < entries; v++) a.grad_bias[v0 + v] += sum_entries[g * strip + v];
  }

  int64_t slice_width(int64_t slice) const { return std::min(columns, h.d - slice * columns); }

  void hidden_product(int64_t slice, int64_t t, int64_t count) {
    k.product(base, by_token + t * token_bytes, token_bytes, count, weights + slice * units(entries) * columns, units(entries),
              a.sum_hidden + (first + t) * h.d + slice * columns, h.d, slice_width(slice), true);
  }

  // A few entries at a time against several slices: their rows of grad_weight are then written in long runs.
  void weight_product(int64_t group, int64_t v) {
    alignas(64) float tile[kProductRows * kSlices * kMaxWidth];
    const int64_t begin = group * kSlices, end = std::min(begin + kSlices, slices), width = std::min(end * columns, h.d) - begin * columns;
    const int64_t bytes = h.dtype == DType::f32 ? 4 : 2;
    for (int64_t r = v; r < std::min(v + kBlock, entries); r += kProductRows) {
      const int64_t count = std::min(kProductRows, entries - r), stride = several_chunks ? slices * columns : kSlices * columns;
      float* sum = several_chunks ? sum_weight + r * stride + begin * columns : tile;
      for (int64_t j = begin; j < end; j++)
        k.product(base, by_entry + r * chunk * size, chunk * size, count, hiddens + j * units(padded) * columns, units(padded),
                  sum + (j - begin) * columns, stride, slice_width(j), first > 0);
      if (first + tokens < h.N) continue;
      for (int64_t i = 0; i < count; i++)
        k.round_to(h.dtype, sum + i * stride, width, static_cast<char*>(a.grad_weight) + ((v0 + r + i) * h.d + begin * columns) * bytes);
    }
  }

  const SweepArgs& a;
  const HeadArgs& h;
  const HeadKernels& k;
  Parallel parallel;
  HeadChunk base{};
  int64_t size, columns, slices, strip, chunk, token_bytes;
  int64_t v0 = 0, entries = 0;                // the strip
  int64_t first = 0, tokens = 0, padded = 0;  // the chunk
  std::vector<HeadChunk> groups;
  bool several_chunks;
  float *transposed, *weights, *hiddens, *sum_weight;
  char *by_entry, *by_token;
  std::vector<float> terms, sum_entries;
};

}  // namespace

void logprobs_sweep(const SweepArgs& args, Isa isa, Parallel parallel) {
  if (args.begin == args.end) return;
  const int64_t row = args.head.d * (args.head.dtype == DType::f32 ? 4 : 2), bytes = (args.end - args.begin) * row;
  if (args.head.N > 0) Sweep(args, kernels_for(isa), parallel).run_all();
  else if (args.grad_weight) std::memset(static_cast<char*>(args.grad_weight) + args.begin * row, 0, bytes);
}

}  // namespace g2rl
