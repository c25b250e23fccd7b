// The backward pass of linear_logprobs on the CPU: the dataflow.  The arithmetic is in kernels/.
//
// dz, the gradient of the logits [N, V], is never held: sum_hidden += dz W and grad_weight = dz^T hidden run over slabs of
// up to 1536 vocabulary entries, and within a slab over chunks of up to 1024 tokens:
//
//   gradient  each tile of 96 entries x 64 tokens: logits, anew or kept (kernels/kept.h), p, dz; kept twice, as rows of entries and rows of tokens,
//             in bf16 for bf16 inputs if products take pairs of bf16, else in float32
//   hidden    sum_hidden[tokens, a block of columns] += dz W, the slab's sum in registers
//   weight    grad_weight[a block of entries, some blocks of columns] = dz^T hidden, likewise; over several chunks in
//             float32, rounded last
//   low       sum_low_hidden += dz low_weight, sum_low_weight += dz^T low_hidden, the same products with narrow blocks of columns
//
// All three are one register tile (product_tile): rows of numbers against a packed operand.  The packed operands are hidden^T
// for the logits, and W and hidden in blocks of 64 columns; packing costs a few percent of the products that use it.
//
// Every number is summed in an order fixed by the shapes alone: the same bits for any number of threads.  bf16 dz is rounded
// once from float32.  1 - p does not cancel: see g2rl_kernels/head/logprobs.py.
#include "logprobs.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "finish.h"
#include "head_kernels.h"
#include "memory.h"
#include "tasks.h"

namespace g2rl {
namespace {

constexpr int64_t kSlab = 16 * kBlock, kChunk = 16 * kMaxWidth;
constexpr int64_t kColumnBlocks = 8;  // blocks of columns of grad_weight that are written together
constexpr int64_t kMemory = 40 << 20;  // bytes of everything that grows with the shapes

// Kept for the thread's next call: fresh pages can cost more than the work on them.
thread_local Workspace workspace;

class Sweep {
 public:
  Sweep(const SweepArgs& args, const HeadKernels& kernels, Parallel parallel) : a(args), h(args.head), k(kernels), parallel(parallel) {
    base.args = &h;
    base.bf16_pairs = h.dtype == DType::bf16 && k.bf16_dot;
    base.low_units = units_of(base.bf16_pairs, h.r);
    base.units = units_of(base.bf16_pairs, h.d) + base.low_units;
    size = base.bf16_pairs ? 2 : 4;
    columns = k.tile_width_for(kMaxWidth);
    column_blocks = ceil_div(h.d, columns);
    low_columns = k.block_width_for(h.r);
    low_blocks = ceil_div(h.r, low_columns);
    by_tokens = a.sum_hidden || a.sum_low_hidden;
    // The slab's weight takes a third of the memory, but at least one block; tokens share the rest.
    // A slab's share of sum_hidden is added at once. Slabs depend on d and r alone and divide kSlab, of which calls begin at
    // multiples: a token's sum has the same bits in any batch.
    const int64_t low_width = low_blocks * low_columns, width = column_blocks * columns + low_width, entry = width * size + width * 4;
    for (slab = kSlab; slab > kBlock && slab * entry > kMemory / 3;) slab /= 2;
    const int64_t token = 2 * width * size + 2 * slab * size;
    chunk = std::clamp((kMemory - slab * entry) / token / kMaxWidth * kMaxWidth, kMaxWidth, kChunk);
    chunk = std::min(chunk, ceil_div(h.N, kMaxWidth) * kMaxWidth);

    token_bytes = slab * size;
    Layout layout;
    const int64_t transposed_at = layout.place(chunk * base.units * 4), entries_at = layout.place(slab * chunk * size);
    const int64_t tokens_at = layout.place(by_tokens ? (chunk + kProductRows) * token_bytes : 0);
    const int64_t weights_at = layout.place(a.sum_hidden ? slab * (width - low_width) * size : 0);
    const int64_t hiddens_at = layout.place(a.grad_weight ? chunk * (width - low_width) * size : 0);
    const int64_t low_weights_at = layout.place(a.sum_low_hidden ? slab * low_width * size : 0);
    const int64_t low_hiddens_at = layout.place(a.sum_low_weight ? chunk * low_width * size : 0);
    several_chunks = chunk < h.N;
    const int64_t sum_at = layout.place(a.grad_weight && several_chunks ? slab * (width - low_width) * 4 : 0);
    char* memory = workspace.reserve(layout.bytes());
    transposed = reinterpret_cast<float*>(memory + transposed_at);
    by_entry = memory + entries_at;
    by_token = memory + tokens_at;
    weights = reinterpret_cast<float*>(memory + weights_at);
    hiddens = reinterpret_cast<float*>(memory + hiddens_at);
    low_weights = reinterpret_cast<float*>(memory + low_weights_at);
    low_hiddens = reinterpret_cast<float*>(memory + low_hiddens_at);
    sum_weight = reinterpret_cast<float*>(memory + sum_at);
    terms.resize(6 * chunk);
    if (a.grad_bias) sum_entries.resize(slab * (chunk / kMaxWidth));
  }

  void run_all() {
    for (v0 = a.begin; v0 < a.end; v0 += slab) {
      entries = std::min(slab, a.end - v0);
      for (int64_t n = 0; n < h.N; n += chunk) {
        if (n != first || token_tiles.empty()) take_chunk(n);
        gradients();
        products();
      }
    }
  }

 private:
  // Tiles of 64 tokens with their terms, and hidden as the packed operands of products.
  void take_chunk(int64_t n) {
    first = n;
    tokens = std::min(chunk, h.N - n);
    token_tiles.clear();
    for (int64_t t = 0; t < tokens; t += kMaxWidth) {
      HeadChunk c = base;
      c.first_token = n + t;
      c.tokens = std::min(kMaxWidth, tokens - t);
      const int64_t width = fitting_width(c.tokens);
      c.tile_width = k.tile_width_for(width);
      c.tiles = width / c.tile_width;
      c.packed = transposed + t * base.units;
      c.temperature = terms.data() + 5 * chunk + t;
      token_tiles.push_back(c);
    }
    padded = (token_tiles.size() - 1) * kMaxWidth + token_tiles.back().tile_width * token_tiles.back().tiles;
    for (int64_t t = 0; t < padded; t++) {
      const bool real = t < tokens;
      for (int64_t i = 0; i < 2; i++) terms[i * chunk + t] = real ? a.normaliser[i * h.N + n + t] : 1e30f;  // p = 0
      for (int64_t i = 0; i < 3; i++) terms[(2 + i) * chunk + t] = real ? a.terms[i * h.N + n + t] : 0.0f;
      terms[5 * chunk + t] = real ? h.temperature_of(n + t) : 1.0f;
    }
    run(parallel, token_tiles.size(), [&](int64_t g) {
      const HeadChunk& c = token_tiles[g];
      for (int64_t p = 0; p < c.tiles; p++) k.pack(c, p, 0, c.units);
      if (a.grad_weight) pack_tokens(c, g, h.hidden, h.d, columns, hiddens);
      if (a.sum_low_weight) pack_tokens(c, g, h.low_hidden, h.r, low_columns, low_hiddens);
    });
  }

  void pack_tokens(const HeadChunk& c, int64_t g, const Matrix& m, int64_t m_columns, int64_t width, float* out) {
    const int64_t at = units(g * kMaxWidth), used = units(c.tokens), all = units(c.tile_width * c.tiles);
    k.pack_rows(c, m, m_columns, width, c.first_token, c.tokens, out + at * width, units(padded) * width);
    for (int64_t j = 0; j < ceil_div(m_columns, width); j++)
      std::memset(out + (j * units(padded) + at + used) * width, 0, 4 * (all - used) * width);
  }

  // Packed units for so many rows
  int64_t units(int64_t rows) const { return units_of(base.bf16_pairs, rows); }

  void gradients() {
    const int64_t count = token_tiles.size(), blocks = ceil_div(entries, kBlock);
    run(parallel, blocks * count, [&](int64_t i) {
      const int64_t b = i / count, g = i % count, v = b * kBlock, n = std::min(kBlock, entries - v), t = g * kMaxWidth;
      GradientBlock block{};
      block.chunk = &token_tiles[g];
      const float** of_tokens[] = {&block.top, &block.log_total, &block.a, &block.e, &block.own};
      for (int64_t j = 0; j < 5; j++) *of_tokens[j] = terms.data() + j * chunk + t;
      block.entry_bytes = chunk * size;
      block.by_entry = by_entry + v * block.entry_bytes + t * size;
      block.token_bytes = token_bytes;
      if (by_tokens) block.by_token = by_token + t * token_bytes + v * size;
      if (a.grad_bias) block.sum_entries = sum_entries.data() + g * slab + v;
      k.gradient(block, v0 + v, n);
      // packed second: gradient() prefetches the block, packing does not, and finds it in cache
      if (g > 0) return;
      if (a.sum_hidden) pack_entries(h.weight, h.d, columns, v, n, weights);
      if (a.sum_low_hidden) pack_entries(h.low_weight, h.r, low_columns, v, n, low_weights);
    });
  }

  void pack_entries(const Matrix& m, int64_t m_columns, int64_t width, int64_t v, int64_t n, float* out) {
    k.pack_rows(base, m, m_columns, width, v0 + v, n, out + units(v) * width, units(entries) * width);
  }

  void products() {
    const int64_t rows = kProductRows * 16, row_tiles = ceil_div(tokens, rows), blocks = ceil_div(entries, kBlock);
    const int64_t of_hidden = a.sum_hidden ? column_blocks * row_tiles : 0;
    const int64_t of_weight = a.grad_weight ? ceil_div(column_blocks, kColumnBlocks) * blocks : 0;
    const int64_t of_low_hidden = a.sum_low_hidden ? row_tiles : 0, of_low_weight = a.sum_low_weight ? blocks : 0;
    const auto count_at = [&](int64_t t) { return std::min(rows, tokens - t); };
    run(parallel, of_hidden + of_weight + of_low_hidden + of_low_weight, [&](int64_t i) {
      if (i < of_hidden) return hidden_product(i / row_tiles, i % row_tiles * rows, count_at(i % row_tiles * rows));
      if ((i -= of_hidden) < of_weight) return weight_product(i / blocks, i % blocks * kBlock);
      if ((i -= of_weight) < of_low_hidden) return low_hidden_product(i * rows, count_at(i * rows));
      low_weight_product((i - of_low_hidden) * kBlock);
    });
    if (a.grad_bias)
      for (int64_t g = 0; g < int64_t(token_tiles.size()); g++)
        for (int64_t v = 0; v < entries; v++) a.grad_bias[v0 + v] += sum_entries[g * slab + v];
  }

  int64_t block_width(int64_t block) const { return std::min(columns, h.d - block * columns); }

  void hidden_product(int64_t block, int64_t t, int64_t count) {
    k.product(base, by_token + t * token_bytes, token_bytes, count, weights + block * units(entries) * columns, columns, units(entries),
              a.sum_hidden + (first + t) * h.d + block * columns, h.d, block_width(block), true);
  }

  // A few entries at a time against kColumnBlocks blocks of columns: rows of grad_weight are then written in long runs.
  void weight_product(int64_t i, int64_t v) {
    alignas(64) float tile[kProductRows * kColumnBlocks * kMaxWidth];
    const int64_t begin = i * kColumnBlocks, end = std::min(begin + kColumnBlocks, column_blocks);
    const int64_t width = std::min(end * columns, h.d) - begin * columns;
    const int64_t bytes = h.dtype == DType::f32 ? 4 : 2;
    for (int64_t r = v; r < std::min(v + kBlock, entries); r += kProductRows) {
      const int64_t count = std::min(kProductRows, entries - r);
      const int64_t stride = several_chunks ? column_blocks * columns : kColumnBlocks * columns;
      float* sum = several_chunks ? sum_weight + r * stride + begin * columns : tile;
      for (int64_t j = begin; j < end; j++)
        k.product(base, by_entry + r * chunk * size, chunk * size, count, hiddens + j * units(padded) * columns, columns,
                  units(padded), sum + (j - begin) * columns, stride, block_width(j), first > 0);
      if (first + tokens < h.N) continue;
      for (int64_t i = 0; i < count; i++)
        k.round_to(h.dtype, sum + i * stride, width, static_cast<char*>(a.grad_weight) + ((v0 + r + i) * h.d + begin * columns) * bytes);
    }
  }

  void low_hidden_product(int64_t t, int64_t count) {
    for (int64_t j = 0; j < low_blocks; j++)
      k.product(base, by_token + t * token_bytes, token_bytes, count, low_weights + j * units(entries) * low_columns, low_columns,
                units(entries), a.sum_low_hidden + (first + t) * h.r + j * low_columns, h.r, low_width(j), true);
  }

  void low_weight_product(int64_t v) {
    for (int64_t j = 0; j < low_blocks; j++)
      k.product(base, by_entry + v * chunk * size, chunk * size, std::min(kBlock, entries - v), low_hiddens + j * units(padded) * low_columns,
                low_columns, units(padded), a.sum_low_weight + (v0 + v) * h.r + j * low_columns, h.r, low_width(j), true);
  }

  int64_t low_width(int64_t block) const { return std::min(low_columns, h.r - block * low_columns); }

  const SweepArgs& a;
  const HeadArgs& h;
  const HeadKernels& k;
  Parallel parallel;
  HeadChunk base{};
  int64_t size, columns, column_blocks, low_columns, low_blocks, slab, chunk, token_bytes;
  bool by_tokens;  // whether dz is kept by tokens too
  int64_t v0 = 0, entries = 0;                // of the current slab
  int64_t first = 0, tokens = 0, padded = 0;  // of the current chunk
  std::vector<HeadChunk> token_tiles;
  bool several_chunks;
  float *transposed, *weights, *hiddens, *low_weights, *low_hiddens, *sum_weight;
  char *by_entry, *by_token;
  std::vector<float> terms, sum_entries;
};

}  // namespace

void head_sweep(const SweepArgs& args, Isa isa, Parallel parallel) {
  if (args.begin == args.end) return;
  const int64_t row = args.head.d * (args.head.dtype == DType::f32 ? 4 : 2), bytes = (args.end - args.begin) * row;
  if (args.head.N > 0) Sweep(args, kernels_for(isa), parallel).run_all();
  else if (args.grad_weight) std::memset(static_cast<char*>(args.grad_weight) + args.begin * row, 0, bytes);
}

namespace {

// Calls body(n) for each token, some to a task.
template <class Body>
void each_token(int64_t N, Parallel parallel, const Body& body) {
  constexpr int64_t kTokens = 4096;
  run(parallel, ceil_div(N, kTokens), [&](int64_t i) {
    for (int64_t n = i * kTokens; n < std::min(N, (i + 1) * kTokens); n++) body(n);
  });
}

}  // namespace

void finish_tokens(const Parts& parts, int64_t N, const Finished& out, Parallel parallel) {
  const int64_t rows = parts.top ? 4 : 3;
  each_token(N, parallel, [&](int64_t n) {
    TokenSums all;
    for (int64_t r = 0; r < parts.count; r++) {
      const double max = parts.sums[rows * r * N + n];
      if (parts.top && max > all.max) all.top = parts.top[r * N + n];  // of equals the first
      all.max = larger(max, all.max);
    }
    for (int64_t r = 0; r < parts.count; r++) {
      const double *part = parts.sums + rows * r * N + n, below = part[0] == -INFINITY ? 0.0 : part[0] - all.max, lift = std::exp(below);
      all.sum += lift * part[N];
      all.moment += lift * (part[2 * N] + part[N] * below);
      if (parts.top) all.squares += lift * lift * part[3 * N];
    }
    const FinishedToken found = finish_token(all, parts.target[n], parts.tokens[n]);
    out.logprobs[n] = float(found.logprob);
    out.entropy[n] = float(found.entropy);
    out.normaliser[n] = float(found.top);
    out.normaliser[N + n] = float(found.log_total + (found.top - double(float(found.top))));
    out.rest[n] = float(found.rest);
    if (!parts.top) return;
    out.sum_p_squared[n] = float(found.sum_p_squared);
    out.top_token[n] = found.top_token;
    out.top_logprob[n] = float(found.top_logprob);
  });
}

void token_terms(const float* grad_logprobs, const float* grad_entropy, const float* logprobs, const float* entropy, int64_t N,
                 float* terms, Parallel parallel) {
  each_token(N, parallel, [&](int64_t n) {
    const double g = grad_logprobs[n], e = grad_entropy[n], log_p = logprobs[n], p = std::exp(log_p);
    // A token outside the vocabulary, where values are not checked, has NaN for its log-probability.
    const bool nothing = g == 0 && e == 0;
    terms[n] = nothing ? 0.0f : float(g + e * entropy[n]);
    terms[N + n] = nothing ? 0.0f : float(e);
    terms[2 * N + n] = nothing ? 0.0f : float(-g * std::expm1(log_p) - (p == 0 ? 0.0 : e * p * (log_p + entropy[n])));
  });
}

}  // namespace g2rl
