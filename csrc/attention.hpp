// Attention on the CPU: over a paged cache of keys and values (decode and chunked prefill), and over ragged sequences
// with gradients (training). fastppo/reference_attention.py states the formulas. Scores, softmax and sums are in fp32.
// The result of a query does not depend on what else is in the batch, on how a sequence is cut into calls, on threads
// or on where its blocks lie; over ragged sequences it has the same bits as over the cache.
#pragma once

#include <cstdint>

namespace fastppo {

constexpr std::int64_t cache_block = 16;  // tokens

// (tokens, heads, size) of float or bfloat16, the numbers of a head side by side.
struct TokenHeads {
  void* data;
  std::int64_t token_stride;  // in elements
  std::int64_t head_stride;
  bool is_bfloat16;
};

// The cache of one layer: keys (blocks, kv_heads, head_size, 16), so that 16 keys of one block lie side by side, and
// values (blocks, kv_heads, 16, value_size). Slots that no token was written to are never used.
struct KeyValuePool {
  void* keys;
  void* values;
  bool is_bfloat16;
  std::int64_t kv_heads;
  std::int64_t head_size;
  std::int64_t value_size;
};

// One row per query. Rows of one sequence, and of sequences that share blocks, are best neighbours: a block is then
// read once for them.
struct PagedRows {
  std::int64_t rows;
  std::int64_t heads;             // of the queries; a multiple of the pool's
  const std::int32_t* sequences;  // (rows,) the sequence's row in the tables
  const std::int32_t* positions;  // (rows,) the query's position, which is the number of keys before its own
  const std::int32_t* tables;     // (sequences, table_stride) block numbers
  std::int64_t table_stride;
};

// score = softcap·tanh(scale·q·k / softcap) - slope·distance, without the tanh where softcap is 0.
struct AttentionShape {
  float scale;
  float softcap;
  std::int64_t window;        // a query sees this many keys, its own included; 0: all before it
  const float* sinks;         // (heads,) logits of a key whose value is zero; null: none
  const float* alibi_slopes;  // (heads,); null: none
};

// Whole sequences side by side. Query i of a sequence has position i + (its keys - its queries).
struct RaggedRows {
  std::int64_t sequences;
  std::int64_t heads;
  std::int64_t kv_heads;
  std::int64_t head_size;
  std::int64_t value_size;
  const std::int32_t* offsets;      // (sequences + 1,) of queries
  const std::int32_t* key_offsets;  // (sequences + 1,) of keys and values
  bool is_causal;                   // otherwise every query sees every key of its sequence
  int threads;
};

// What the backward pass reads, and the last three that it writes.
struct BackwardHeads {
  TokenHeads queries, keys, values, out, d_out, d_queries, d_keys, d_values;
};

// What every build of attention.inc.hpp, attention_training.inc.hpp and attention_backward.inc.hpp offers.
struct AttentionKernels {
  // Each does the part of thread `thread` of `num_threads`, for callers that are in a parallel region: writes must be
  // done (a barrier) before any thread attends. Keys (rows, kv_heads, head_size), values (rows, kv_heads, value_size).
  void (*write_part)(const PagedRows& rows, const KeyValuePool& pool, const TokenHeads& keys, const TokenHeads& values,
                     int thread, int num_threads);
  // Queries (rows, heads, head_size) to out (rows, heads, value_size). `scratch` is this thread's alone: scratch_bytes
  // bytes, aligned to 64, with anything in them.
  void (*attend_part)(const PagedRows& rows, const KeyValuePool& pool, const AttentionShape& shape,
                      const TokenHeads& queries, const TokenHeads& out, void* scratch, int thread, int num_threads);
  std::int64_t (*scratch_bytes)(std::int64_t heads, const KeyValuePool& pool);
  // Writes out (T, heads, value_size) and log_sums (T, heads), the log of the sum of each softmax, if not null.
  void (*forward)(const RaggedRows& rows, const AttentionShape& shape, const TokenHeads& queries,
                  const TokenHeads& keys, const TokenHeads& values, const TokenHeads& out, float* log_sums);
  // Writes d_queries, d_keys and d_values; the gradient by the sinks follows from out, d_out and log_sums.
  void (*backward)(const RaggedRows& rows, const AttentionShape& shape, const BackwardHeads& heads,
                   const float* log_sums);
};

}  // namespace fastppo
