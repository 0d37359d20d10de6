// Attention over the paged cache for one instruction set; included by the file that is compiled for it.
#pragma once

#include "attention_tile.inc.hpp"

namespace fastppo {
namespace {

constexpr std::int64_t most_tile_rows = 16;

// Rows that share a step, so that about 32 queries (rows times the heads of a group) read a block together.
inline std::int64_t tile_rows(std::int64_t group) { return smaller(most_tile_rows, larger(1, 32 / group)); }

// Consecutive rows with the queries of all heads that share one head of keys: query = row·group + head in the group.
struct Tile {
  std::int64_t rows;
  std::int64_t group;
  std::int64_t head_size;
  std::int64_t value_size;
  std::int64_t first[most_tile_rows];  // the keys that a row sees
  std::int64_t last[most_tile_rows];
  const std::int32_t* tables[most_tile_rows];
  float* queries;  // (rows·group, head_size up to a multiple of 16), times what makes the product with a key the score
  float* sums;     // (rows·group, value_size up to a multiple of 16)
  float* scores;   // (rows·group, chunk_keys)
  Softmax* softmax;
  float* values;  // a chunk's, with zeros up to a multiple of 16, where the cache has none
};

inline std::int64_t tile_bytes(std::int64_t group, std::int64_t head_size, std::int64_t value_size) {
  const std::int64_t queries = tile_rows(group) * group, values = round_up(value_size);
  const std::int64_t numbers = queries * (round_up(head_size) + chunk_keys + values) + chunk_keys * values;
  return numbers * static_cast<std::int64_t>(sizeof(float)) + queries * static_cast<std::int64_t>(sizeof(Softmax));
}

inline Tile make_tile(void* scratch, std::int64_t group, std::int64_t head_size, std::int64_t value_size) {
  const std::int64_t queries = tile_rows(group) * group;
  Tile tile = {0, group, head_size, value_size, {}, {}, {}, static_cast<float*>(scratch), nullptr, nullptr, nullptr,
               nullptr};
  tile.sums = tile.queries + queries * round_up(head_size);
  tile.scores = tile.sums + queries * round_up(value_size);
  tile.values = tile.scores + queries * chunk_keys;
  tile.softmax = reinterpret_cast<Softmax*>(tile.values + chunk_keys * round_up(value_size));
  return tile;
}

// One head of the cache.
template <typename T>
struct HeadCache {
  const T* keys;
  const T* values;
  std::int64_t key_step;  // elements from block to block
  std::int64_t value_step;
  std::int64_t value_stride;  // from value to value
};

inline float query_factor(const AttentionShape& shape) {
  return shape.softcap > 0 ? shape.scale / shape.softcap : shape.scale;
}

inline Shaping shaping_of(const AttentionShape& shape, std::int64_t head, std::int64_t first, std::int64_t last) {
  return {shape.softcap, shape.alibi_slopes == nullptr ? 0.0f : shape.alibi_slopes[head], first, last};
}

// Rows that read the same blocks of a chunk, lo to hi.
struct Run {
  std::int32_t blocks[chunk_blocks];
  std::int64_t lo;
  std::int64_t hi;
};

// Take a row into the run unless it reads no block of the run's, or another one in the place of such.
inline bool join(const Tile& tile, std::int64_t row, std::int64_t chunk, Run* run) {
  const std::int64_t start = chunk * chunk_blocks;
  const std::int64_t lo = larger(tile.first[row] / cache_block - start, 0);
  const std::int64_t hi = smaller(tile.last[row] / cache_block - start + 1, chunk_blocks);
  const bool is_new = run->lo == run->hi;
  if (lo >= hi || !(is_new || (lo < run->hi && hi > run->lo))) return false;
  const std::int32_t* blocks = tile.tables[row] + start;
  for (std::int64_t b = larger(lo, run->lo); b < smaller(hi, run->hi); ++b) {
    if (run->blocks[b] != blocks[b]) return false;
  }
  for (std::int64_t b = lo; b < hi; ++b) run->blocks[b] = blocks[b];
  run->lo = is_new ? lo : smaller(lo, run->lo);
  run->hi = is_new ? hi : larger(hi, run->hi);
  return true;
}

// Add what queries begin..end of the tile take from the values of a chunk.
template <typename T>
inline void add_values(const Tile& tile, std::int64_t begin, std::int64_t end, std::int64_t chunk, const Run& run,
                       const T* const* values, std::int64_t value_stride) {
  const std::int64_t size = round_up(tile.value_size), start = chunk * chunk_keys;
  for (std::int64_t q = begin; q < end;) {
    const std::int64_t count = end - q >= 4 ? 4 : 1;
    std::int64_t first = run.hi * cache_block, last = -1;
    for (std::int64_t r = q / tile.group; r <= (q + count - 1) / tile.group; ++r) {
      first = smaller(first, tile.first[r] - start);
      last = larger(last, tile.last[r] - start);
    }
    const Terms<T> terms = {tile.scores + q * chunk_keys,
                            chunk_keys,
                            1,
                            values,
                            value_stride,
                            larger(first, run.lo * cache_block),
                            smaller(last + 1, run.hi * cache_block)};
    float* sums = tile.sums + q * size;
    count == 4 ? add_terms<4>(terms, size, sums, size) : add_terms<1>(terms, size, sums, size);
    q += count;
  }
}

// One chunk of keys for the rows begin..end of the tile, which read the same blocks.
template <typename T>
inline void attend_run(const HeadCache<T>& cache, const Tile& tile, const AttentionShape& shape, std::int64_t head,
                       std::int64_t begin, std::int64_t end, std::int64_t chunk, const Run& run) {
  const std::int64_t size = round_up(tile.value_size), group = tile.group, start = chunk * chunk_keys;
  const T* keys[chunk_blocks];
  const T* values[chunk_blocks];
  for (std::int64_t b = run.lo; b < run.hi; ++b) {
    keys[b] = cache.keys + run.blocks[b] * cache.key_step;
    values[b] = cache.values + run.blocks[b] * cache.value_step;
  }
  const std::int64_t stride = round_up(tile.head_size);
  score(tile.queries + begin * group * stride, (end - begin) * group, stride, keys + run.lo, run.hi - run.lo,
        tile.head_size, tile.scores + begin * group * chunk_keys + run.lo * cache_block);
  for (std::int64_t r = begin; r < end; ++r) {
    for (std::int64_t q = r * group; q < (r + 1) * group; ++q) {
      const Shaping how = shaping_of(shape, head + q - r * group, tile.first[r] - start, tile.last[r] - start);
      weigh(tile.scores + q * chunk_keys, run.lo * cache_block, run.hi * cache_block, how, tile.softmax + q,
            tile.sums + q * size, size);
    }
  }
  if (cache.value_stride == size) {
    add_values(tile, begin * group, end * group, chunk, run, values, cache.value_stride);
    return;
  }
  const float* copies[chunk_blocks];
  for (std::int64_t b = run.lo; b < run.hi; ++b) {
    copies[b] = tile.values + b * cache_block * size;
    for (std::int64_t j = 0; j < cache_block; ++j) {
      copy_head(values[b] + j * cache.value_stride, tile.value_size, 1.0f, tile.values + (b * cache_block + j) * size);
    }
  }
  add_values(tile, begin * group, end * group, chunk, run, copies, size);
}

// All keys for all rows of the tile, whose queries are in place; `head` is the first of the group's.
template <typename T>
inline void attend_tile(const HeadCache<T>& cache, const Tile& tile, const AttentionShape& shape, std::int64_t head) {
  const std::int64_t count = tile.rows * tile.group;
  std::int64_t first = tile.first[0], last = tile.last[0];
  for (std::int64_t r = 1; r < tile.rows; ++r) {
    first = smaller(first, tile.first[r]);
    last = larger(last, tile.last[r]);
  }
  for (std::int64_t q = 0; q < count; ++q) {
    const bool has_sink = shape.sinks != nullptr;
    tile.softmax[q] = {has_sink ? shape.sinks[head + q % tile.group] : lowest_score, has_sink ? 1.0f : 0.0f};
  }
  for (std::int64_t i = 0; i < count * round_up(tile.value_size); ++i) tile.sums[i] = 0;
  for (std::int64_t chunk = first / chunk_keys; chunk * chunk_keys <= last; ++chunk) {
    for (std::int64_t begin = 0; begin < tile.rows;) {
      Run run = {{}, 0, 0};
      std::int64_t end = begin;
      while (end < tile.rows && join(tile, end, chunk, &run)) ++end;
      if (end > begin) attend_run(cache, tile, shape, head, begin, end, chunk, run);
      begin = larger(end, begin + 1);
    }
  }
}

inline void load_queries(const Tile& tile, const TokenHeads& queries, std::int64_t token, std::int64_t head,
                         float factor) {
  for (std::int64_t q = 0; q < tile.rows * tile.group; ++q) {
    load_head(queries, token + q / tile.group, head + q % tile.group, tile.head_size, factor,
              tile.queries + q * round_up(tile.head_size));
  }
}

inline void store_sums(const Tile& tile, const TokenHeads& out, std::int64_t token, std::int64_t head) {
  for (std::int64_t q = 0; q < tile.rows * tile.group; ++q) {
    const float total = tile.softmax[q].total;
    store_head(tile.sums + q * round_up(tile.value_size), total == 0 ? 0.0f : 1.0f / total, tile.value_size, out,
               token + q / tile.group, head + q % tile.group);
  }
}

template <typename T>
inline void attend_head(const PagedRows& rows, const KeyValuePool& pool, const AttentionShape& shape,
                        const TokenHeads& queries, const TokenHeads& out, std::int64_t head, std::int64_t start,
                        Tile* tile) {
  for (std::int64_t r = 0; r < tile->rows; ++r) {
    tile->last[r] = rows.positions[start + r];
    tile->first[r] = shape.window > 0 ? larger(0, tile->last[r] + 1 - shape.window) : 0;
    tile->tables[r] = rows.tables + rows.sequences[start + r] * rows.table_stride;
  }
  const std::int64_t key_size = pool.head_size * cache_block, value_size = pool.value_size * cache_block;
  const HeadCache<T> cache = {static_cast<const T*>(pool.keys) + head * key_size,
                              static_cast<const T*>(pool.values) + head * value_size, pool.kv_heads * key_size,
                              pool.kv_heads * value_size, pool.value_size};
  load_queries(*tile, queries, start, head * tile->group, query_factor(shape));
  attend_tile(cache, *tile, shape, head * tile->group);
  store_sums(*tile, out, start, head * tile->group);
}

// The work is cut where it is done to thread/num_threads, so that threads share keys, not rows.
void attend_part(const PagedRows& rows, const KeyValuePool& pool, const AttentionShape& shape,
                 const TokenHeads& queries, const TokenHeads& out, void* scratch, int thread, int num_threads) {
  const std::int64_t group = rows.heads / pool.kv_heads, most = tile_rows(group);
  const auto work_of = [&](std::int64_t begin, std::int64_t end) {
    std::int64_t work = 0;
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int64_t keys = rows.positions[r] + 1;
      work += cache_block + (shape.window > 0 ? smaller(keys, shape.window) : keys);
    }
    return work;
  };
  const std::int64_t all = pool.kv_heads * work_of(0, rows.rows);
  Tile tile = make_tile(scratch, group, pool.head_size, pool.value_size);
  std::int64_t done = 0;
  for (std::int64_t head = 0; head < pool.kv_heads; ++head) {
    for (std::int64_t start = 0; start < rows.rows; start += most) {
      tile.rows = smaller(most, rows.rows - start);
      const std::int64_t work = work_of(start, start + tile.rows);
      if ((2 * done + work) * num_threads / (2 * all) == thread) {
        pool.is_bfloat16 ? attend_head<BFloat16>(rows, pool, shape, queries, out, head, start, &tile)
                         : attend_head<float>(rows, pool, shape, queries, out, head, start, &tile);
      }
      done += work;
    }
  }
}

template <typename T>
inline void write_token(const PagedRows& rows, const KeyValuePool& pool, const TokenHeads& keys,
                        const TokenHeads& values, std::int64_t row) {
  const std::int64_t position = rows.positions[row], slot = position % cache_block;
  const std::int64_t block = rows.tables[rows.sequences[row] * rows.table_stride + position / cache_block];
  for (std::int64_t head = 0; head < pool.kv_heads; ++head) {
    const std::int64_t place = (block * pool.kv_heads + head) * cache_block;
    T* key = static_cast<T*>(pool.keys) + place * pool.head_size + slot;
    T* value = static_cast<T*>(pool.values) + (place + slot) * pool.value_size;
    for (std::int64_t d = 0; d < pool.head_size; ++d) {
      from_float(number_at(keys, row, head, d), key + d * cache_block);
      // Keeps the compiler from scatter instructions, which take several times as long.
      asm volatile("" ::: "memory");
    }
    for (std::int64_t d = 0; d < pool.value_size; ++d) from_float(number_at(values, row, head, d), value + d);
  }
}

void write_part(const PagedRows& rows, const KeyValuePool& pool, const TokenHeads& keys, const TokenHeads& values,
                int thread, int num_threads) {
  for (std::int64_t r = rows.rows * thread / num_threads; r < rows.rows * (thread + 1) / num_threads; ++r) {
    pool.is_bfloat16 ? write_token<BFloat16>(rows, pool, keys, values, r)
                     : write_token<float>(rows, pool, keys, values, r);
  }
}

std::int64_t scratch_bytes(std::int64_t heads, const KeyValuePool& pool) {
  return tile_bytes(heads / pool.kv_heads, pool.head_size, pool.value_size);
}

}  // namespace
}  // namespace fastppo
