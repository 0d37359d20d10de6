// One step of a decoder's body as a list of operations on activation buffers, for any number of rows (tokens).
// fastppo/engine/program.py makes the list from a transformers model. Row-wise operations share rows among the threads,
// matmuls share outputs; every row's result depends on that row and its keys alone.
#pragma once

#include <cstdint>

#include "attention.hpp"
#include "small_matmul.hpp"

namespace fastppo {

enum class Operation : int { embed, normalise, add, rotate, activate, pack, multiply, write, attend };
enum class Nonlinearity : int { silu, gelu, gelu_tanh, quick_gelu, relu, relu_squared };

// From a column on of an activation buffer; buffer -1 is none.
struct Place {
  std::int64_t buffer, column;
};

struct EmbedOperation {
  Place to;
  const void* table;  // (ids, width)
  std::int64_t table_stride;
  bool is_bfloat16;
  const float* positions;  // learned positions (positions, width), from `position_offset` on; null: none
  std::int64_t position_offset;
  float scale;
};

// `groups` neighbouring stretches of `width` columns, each to mean square 1 (RMS) or to mean 0 and variance 1.
struct NormaliseOperation {
  Place from, to;
  std::int64_t groups, weight_stride;  // the stride is from group to group
  const float* weight;
  const float* bias;  // null: none
  float epsilon;
  bool is_centred;
};

struct AddOperation {
  Place from, to;
  float scale;
};

// Heads from the columns where a projection left them to their places side by side, turned by the angles of table
// `rope` (-1: not turned) in their first columns.
struct RotateOperation {
  Place from, to;
  const std::int64_t* columns;  // (heads,) the first column of each
  std::int64_t heads, rope;
  bool is_interleaved;  // pairs are (0, 1), (2, 3), ... instead of (0, half), (1, half + 1), ...
};

// f(gate), times `up` unless that is none.
struct ActivateOperation {
  Place gate, up, to;
  Nonlinearity function;
};

// The addresses and rows are filled in for each step.
struct MultiplyOperation {
  Place from, to;
  std::int64_t shared_pack;  // number of the packed copy to read or to write; -1: a copy for each thread alone
  SmallMatmul matmul;
};

struct AttendOperation {
  Place queries, keys, values, to;
  std::int64_t layer, group, heads;  // `group` numbers the block tables
  AttentionShape shape;
};

struct DecodeOperation {
  Operation kind;
  bool waits;          // for all threads to have done what comes before
  std::int64_t width;  // columns that a row-wise operation works on (per group or head, where there are such)
  union {
    EmbedOperation embed;
    NormaliseOperation normalise;
    AddOperation add;
    RotateOperation rotate;
    ActivateOperation activate;
    MultiplyOperation multiply;  // pack too
    AttendOperation attend;      // write too
  };
};

struct BlockTables {
  const std::int32_t* data;
  std::int64_t stride;
};

// cos and sin (positions, width) of the angles.
struct RopeTable {
  const float* cosines;
  const float* sines;
  std::int64_t width;
};

struct DecodeStep {
  std::int64_t rows;
  const std::int64_t* ids;         // (rows,)
  const std::int32_t* positions;   // (rows,)
  const std::int32_t* sequences;   // (rows,) row of the block tables
  const BlockTables* tables;       // by group
  const KeyValuePool* pools;       // by layer
  const RopeTable* ropes;
  float* const* buffers;
  const std::int64_t* strides;     // of the buffers' rows
  void* const* packs;              // the shared copies that matmuls read
  bool rounds;                     // every operation's results to bfloat16, as the modules of a bf16 model do
};

// What every build of decode_operations.inc.hpp offers.
struct DecodeKernels {
  // What thread `thread` of `num_threads` does of an operation.
  void (*part)(const DecodeOperation& operation, const DecodeStep& step, int thread, int num_threads);
};

}  // namespace fastppo
