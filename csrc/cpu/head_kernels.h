// Interface between the dataflow (head.cpp, logprobs.cpp) and the kernels of each instruction set (kernels/).
#pragma once
#include <cstdint>

#include "head.h"

namespace g2rl {

constexpr int64_t kMaxWidth = 64;   // most tokens in flight
constexpr int64_t kWidths[] = {64, 48, 32, 16};  // widths of a chunk of tokens: whole register tiles

// The least width that holds that many tokens
constexpr int64_t fitting_width(int64_t tokens) {
  int64_t best = kMaxWidth;
  for (int64_t width : kWidths)
    if (width >= tokens) best = width;
  return best;
}

// Stride of partial projections.  Rows a multiple of 4 KiB apart would compete for the same few lines of L1.
constexpr int64_t row_stride(int64_t d) { return d + 16; }

// Tokens of one response inside a chunk; they add to row `row` of the residual matrix A.
struct ResponseTokens {
  int64_t begin, end;  // columns of the chunk
  int64_t row;
  bool fresh;  // first addition to the row: store instead of adding
};

// A chunk of tokens, and the slab [slab_begin, slab_end) of the vocabulary that its buffers hold.
struct HeadChunk {
  const HeadArgs* args;
  int64_t first_token, tokens;  // rows of hidden
  int64_t tile_width;           // tokens side by side in one register tile (a multiple of the vector length)
  int64_t tiles;                // register tiles that hold the chunk
  int64_t units;                // length of a row of packed: that of weight, and behind it that of low_weight
  int64_t low_units;            // length of a row of low_weight in units of four bytes: r floats, or r / 2 pairs of bf16
  bool bf16_pairs;
  const float* temperature;     // [tiles * tile_width], of each token
  int64_t slab_begin, slab_end;
  float* packed;                // [tiles][units][tile_width]: [hidden, low_hidden], transposed, so that tokens are vector lanes
  uint16_t* codes;              // [block][tiles][kBlock][tile_width]: exp(z - block max), see softmax_columns(); null: statistics only
  float *block_max, *block_sum, *block_moment;  // [block][tiles * tile_width]
  float *block_squares, *block_top;             // with statistics: sum exp(2 (z - block max)), and the row of block max
  float* target_logit;          // [tiles * tile_width]
  // for collect():
  const float *max, *weight;    // [tiles * tile_width]: reference maximum and factor of each token
  const float* target_residual; // [tiles * tile_width]: factor times 1 - p of the realised token
  const ResponseTokens* responses;
  int64_t response_count;
  float* residual;              // A: [rows][slab_end - slab_begin]
};

// One block of vocabulary rows against one chunk of tokens, for gradients (logprobs.cpp).
struct GradientBlock {
  const HeadChunk* chunk;
  const float *top, *log_total, *a, *e, *own;  // [tiles * tile_width]: the normaliser and the terms of each token
  char *by_entry, *by_token;                   // dz as rows of vocabulary entries, and of tokens (or null)
  int64_t entry_bytes, token_bytes;            // from row to row
  float* sum_entries;                          // [count], sums over the chunk's tokens; or null
};

// Sums over the blocks so far, [tiles * tile_width] each.
struct RunningSums {
  float *max, *sum, *lost, *moment;  // sum - lost is the sum; moment in quarter log2, relative to max
  float* squares;                    // with statistics
  int64_t* top;
};

struct HeadKernels {
  bool bf16_dot;                        // bf16 weights are multiplied as pairs, without conversion
  int64_t (*tile_width_for)(int64_t width);  // HeadChunk::tile_width for a chunk of up to `width` tokens
  void (*pack)(const HeadChunk&, int64_t tile, int64_t unit_begin, int64_t unit_end);
  // logits of one block, its softmax statistics and codes, its target logits
  void (*forward)(const HeadChunk&, int64_t block);
  // adds the slab's blocks, in order
  void (*merge)(const HeadChunk&, const RunningSums&);
  // A[row, v] -= sum_t weight_t exp(z_tv - max_t) for the block's rows v, 16 tokens after the other; += the realised tokens' own
  void (*collect)(const HeadChunk&, int64_t block);
  // out[j, :] = sum_{v in [begin, end)} A[rows[j], v - slab_begin] [weight, low_weight][v, :]; rows of out are row_stride(d + r) apart
  void (*project)(const HeadChunk&, const int64_t* rows, int64_t row_count, int64_t begin, int64_t end, float* out);
  // The same added to out, for a few rows of weight that are in cache
  void (*project_cached)(const HeadChunk&, const int64_t* rows, int64_t row_count, int64_t begin, int64_t end, float* out);
  // dz of vocabulary rows [v0, v0 + count)
  void (*gradient)(const GradientBlock&, int64_t v0, int64_t count);
  // width of the blocks in which product() takes a matrix of so many columns: narrow ones for few
  int64_t (*block_width_for)(int64_t columns);
  // rows of a matrix as the packed operand of product(), in blocks of `width` of its columns
  void (*pack_rows)(const HeadChunk&, const Matrix&, int64_t columns, int64_t width, int64_t row, int64_t count, float* out,
                    int64_t block_stride);
  // out[r, :] (+)= rows[r, :] . packed, for a block of `width` columns, of which `columns` are written
  void (*product)(const HeadChunk&, const char* rows, int64_t row_bytes, int64_t count, const float* packed, int64_t width, int64_t units,
                  float* out, int64_t out_stride, int64_t columns, bool accumulate);
  void (*round_to)(DType, const float* x, int64_t n, void* out);
  // elements [begin, begin + n) of a row as floats
  void (*unpack)(DType, const Matrix&, int64_t row, int64_t begin, int64_t n, float* out);
  // out[k] = m[index[k], :] . x, for n columns; indices outside [0, M) count as rows of zeros
  void (*gather_dot)(DType, const Matrix& m, int64_t M, const int64_t* index, int64_t count, const float* x, int64_t n, float* out);
  // sums[j] += sum of c[k] m[index[k], j] over k, in order
  void (*gather_add)(DType, const Matrix& m, int64_t M, const int64_t* index, int64_t count, const float* c, int64_t n, float* sums);
};

constexpr int64_t kProductRows = 6;  // product() reads whole tiles of this many rows

// Length in units of four bytes of a row of so many numbers of the head's dtype
constexpr int64_t units_of(bool bf16_pairs, int64_t columns) { return bf16_pairs ? (columns + 1) / 2 : columns; }

const HeadKernels& head_kernels_plain();
const HeadKernels& head_kernels_avx2();
const HeadKernels& head_kernels_avx512();
const HeadKernels& head_kernels_avx512bf16();

const HeadKernels& kernels_for(Isa isa);

}  // namespace g2rl
