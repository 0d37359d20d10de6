// Attention over ragged sequences for one instruction set; included by the file that is compiled for it. The keys of a
// sequence are laid out as the cache has them, and then attended to by the same code.
#pragma once

#include "attention.inc.hpp"
#include "sampling.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastppo {
namespace {

// One sequence under one head of keys.
struct Sequence {
  Sequence(const RaggedRows& rows, std::int64_t index, std::int64_t head)
      : start(rows.offsets[index]),
        queries(rows.offsets[index + 1] - start),
        key_start(rows.key_offsets[index]),
        keys(rows.key_offsets[index + 1] - key_start),
        head(head),
        blocks(round_up(keys) / cache_block) {}
  std::int64_t start;
  std::int64_t queries;
  std::int64_t key_start;
  std::int64_t keys;
  std::int64_t head;
  std::int64_t blocks;

  // Find which keys query i sees.
  void find_seen(const RaggedRows& rows, const AttentionShape& shape, std::int64_t i, std::int64_t* first,
                 std::int64_t* last) const {
    *last = rows.is_causal ? i + keys - queries : keys - 1;
    *first = shape.window > 0 ? larger(0, *last + 1 - shape.window) : 0;
  }
};

inline std::int64_t most_keys(const RaggedRows& rows) {
  std::int64_t most = 0;
  for (std::int64_t s = 0; s < rows.sequences; ++s) {
    most = larger(most, rows.key_offsets[s + 1] - rows.key_offsets[s]);
  }
  return round_up(most);
}

// Copy the keys or values of a sequence side by side, with zeros up to a multiple of 16 in size and in number.
inline void copy_rows(const Sequence& sequence, const TokenHeads& from, std::int64_t size, float* to) {
  for (std::int64_t j = 0; j < sequence.keys; ++j) {
    load_head(from, sequence.key_start + j, sequence.head, size, 1.0f, to + j * round_up(size));
  }
  float* end = to + sequence.blocks * cache_block * round_up(size);
  for (float* rest = to + sequence.keys * round_up(size); rest < end; ++rest) *rest = 0;
}

// Copy rows (blocks·16, size up to a multiple of 16) to blocks (size, 16) as the cache has its keys.
inline void transpose(const Sequence& sequence, const float* from, std::int64_t size, float* to) {
  const std::int64_t stride = round_up(size);
  for (std::int64_t j = 0; j < sequence.blocks * cache_block; j += 4, from += 4 * stride) {
    float* block = to + j / cache_block * size * cache_block + j % cache_block;
    std::int64_t d = 0;
#if defined(__SSE2__)
    for (; d + 4 <= size; d += 4) {
      __m128 a = _mm_loadu_ps(from + d), b = _mm_loadu_ps(from + stride + d);
      __m128 c = _mm_loadu_ps(from + 2 * stride + d), e = _mm_loadu_ps(from + 3 * stride + d);
      _MM_TRANSPOSE4_PS(a, b, c, e);
      float* column = block + d * cache_block;
      _mm_storeu_ps(column, a);
      _mm_storeu_ps(column + cache_block, b);
      _mm_storeu_ps(column + 2 * cache_block, c);
      _mm_storeu_ps(column + 3 * cache_block, e);
    }
#endif
    for (; d < size; ++d) {
      for (std::int64_t i = 0; i < 4; ++i) block[d * cache_block + i] = from[i * stride + d];
    }
  }
}

inline void forward_sequence(const RaggedRows& rows, const AttentionShape& shape, const TokenHeads& queries,
                             const HeadCache<float>& cache, const std::int32_t* table, const Sequence& sequence,
                             const TokenHeads& out, float* log_sums, Tile* tile) {
  const std::int64_t most = tile_rows(tile->group), head = sequence.head * tile->group;
  for (std::int64_t start = 0; start < sequence.queries; start += most) {
    tile->rows = smaller(most, sequence.queries - start);
    for (std::int64_t r = 0; r < tile->rows; ++r) {
      sequence.find_seen(rows, shape, start + r, tile->first + r, tile->last + r);
      tile->tables[r] = table;
    }
    load_queries(*tile, queries, sequence.start + start, head, query_factor(shape));
    attend_tile(cache, *tile, shape, head);
    store_sums(*tile, out, sequence.start + start, head);
    for (std::int64_t q = 0; log_sums != nullptr && q < tile->rows * tile->group; ++q) {
      const Softmax& softmax = tile->softmax[q];
      const std::int64_t token = sequence.start + start + q / tile->group;
      log_sums[token * rows.heads + head + q % tile->group] = softmax.top + __builtin_logf(softmax.total);
    }
  }
}

void forward(const RaggedRows& rows, const AttentionShape& shape, const TokenHeads& queries, const TokenHeads& keys,
             const TokenHeads& values, const TokenHeads& out, float* log_sums) {
  const std::int64_t most = most_keys(rows), group = rows.heads / rows.kv_heads;
  const std::int64_t key_width = round_up(rows.head_size), width = round_up(rows.value_size);
  const std::int64_t numbers = most * (2 * key_width + width + 1);
  const std::int64_t bytes = tile_bytes(group, rows.head_size, rows.value_size);
#pragma omp parallel num_threads(rows.threads)
  {
    auto* copies = static_cast<float*>(thread_scratch(static_cast<std::size_t>(4 * numbers + bytes)));
    float *copied_values = copies + most * key_width, *cached_keys = copied_values + most * width;
    auto* table = reinterpret_cast<std::int32_t*>(cached_keys + most * key_width);
    for (std::int32_t b = 0; b < most / cache_block; ++b) table[b] = b;
    Tile tile = make_tile(copies + numbers, group, rows.head_size, rows.value_size);
    const HeadCache<float> cache = {cached_keys, copied_values, rows.head_size * cache_block, width * cache_block,
                                    width};
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t item = 0; item < rows.sequences * rows.kv_heads; ++item) {
      const Sequence sequence(rows, item / rows.kv_heads, item % rows.kv_heads);
      copy_rows(sequence, keys, rows.head_size, copies);
      copy_rows(sequence, values, rows.value_size, copied_values);
      transpose(sequence, copies, rows.head_size, cached_keys);
      forward_sequence(rows, shape, queries, cache, table, sequence, out, log_sums, &tile);
    }
  }
}

}  // namespace
}  // namespace fastppo
