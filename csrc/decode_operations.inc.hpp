// The operations of a decode step for one instruction set; included by the file that is compiled for it.
#pragma once

#include "attention_training.inc.hpp"
#include "decode_operations.hpp"
#include "elementary.hpp"
#include "fused_rows.inc.hpp"
#include "sampling.hpp"
#include "small_matmul.inc.hpp"

namespace fastppo {
namespace {

// An operation on one row: the buffers' addresses are resolved here.
struct DecodeRow {
  const DecodeStep& step;
  std::int64_t row;

  float* at(Place place) const {
    return step.buffers[place.buffer] + row * step.strides[place.buffer] + place.column;
  }
};

template <typename T>
inline void embed_row(const T* entry, const float* position, float scale, std::int64_t width, float* out) {
  for (std::int64_t i = 0; i < width; ++i) out[i] = to_float(entry[i]) * scale;
  if (position == nullptr) return;
  for (std::int64_t i = 0; i < width; ++i) out[i] += position[i];
}

inline void embed(const EmbedOperation& op, std::int64_t width, const DecodeRow& row) {
  const std::int64_t id = row.step.ids[row.row], position = row.step.positions[row.row] + op.position_offset;
  const float* added = op.positions == nullptr ? nullptr : op.positions + position * width;
  float* out = row.at(op.to);
  if (op.is_bfloat16) {
    embed_row(static_cast<const BFloat16*>(op.table) + id * op.table_stride, added, op.scale, width, out);
  } else {
    embed_row(static_cast<const float*>(op.table) + id * op.table_stride, added, op.scale, width, out);
  }
}

// RMSNorm sums in the order of the fused one, so that a rollout's have the bits of an update's.
inline void normalise_group(const NormaliseOperation& op, const float* x, const float* weight, std::int64_t width,
                            float* out) {
  const auto from = fused::row_at<float>(x, 0, width), scale = fused::row_at<float>(weight, 0, width);
  const auto to = fused::row_at<float>(out, 0, width), bias = fused::row_at<float>(op.bias, 0, width);
  const float count = static_cast<float>(width);
  const float total = op.is_centred ? fused::sum_over(width, [&](std::int64_t i) { return from.load(i); }) : 0.0f;
  for (std::int64_t i = 0; i < width && (op.is_centred || x != out); i += Vec::width) {
    to.store(i, from.load(i) - Vec::of(total / count));
  }
  const float squares = fused::sum_over(width, [&](std::int64_t i) { return to.load(i) * to.load(i); });
  const Vec inverse = Vec::of(1.0f / __builtin_sqrtf(squares / count + op.epsilon));
  for (std::int64_t i = 0; i < width; i += Vec::width) {
    const Vec scaled = to.load(i) * inverse * scale.load(i);
    to.store(i, op.bias == nullptr ? scaled : scaled + bias.load(i));
  }
}

inline void normalise(const NormaliseOperation& op, std::int64_t width, const DecodeRow& row) {
  const float* from = row.at(op.from);
  float* to = row.at(op.to);
  for (std::int64_t g = 0; g < op.groups; ++g) {
    normalise_group(op, from + g * width, op.weight + g * op.weight_stride, width, to + g * width);
  }
}

inline void add(const AddOperation& op, std::int64_t width, const DecodeRow& row) {
  const float* from = row.at(op.from);
  float* to = row.at(op.to);
  for (std::int64_t i = 0; i < width; ++i) to[i] += op.scale * from[i];
}

// Turns (0, 1), (2, 3), ... of the first `width` numbers, and copies the rest.
inline void rotate_pairs(const float* x, const float* cosines, const float* sines, std::int64_t width,
                         std::int64_t size, float* out) {
  for (std::int64_t i = 0; i < width; i += 2) {
    out[i] = x[i] * cosines[i] - x[i + 1] * sines[i];
    out[i + 1] = x[i + 1] * cosines[i + 1] + x[i] * sines[i + 1];
  }
  for (std::int64_t i = width; i < size; ++i) out[i] = x[i];
}

inline void rotate(const RotateOperation& op, std::int64_t width, const DecodeRow& row) {
  const float* from = row.at(op.from);
  float* to = row.at(op.to);
  const RopeTable rope = op.rope < 0 ? RopeTable{nullptr, nullptr, 0} : row.step.ropes[op.rope];
  const std::int64_t first = row.step.positions[row.row] * rope.width;
  const float *cosines = rope.cosines + first, *sines = rope.sines + first;
  Rotation rotation = {};
  rotation.rotary = rope.width;
  rotation.size = width;
  for (std::int64_t h = 0; h < op.heads; ++h) {
    const float* head = from + op.columns[h];
    float* out = to + h * width;
    op.is_interleaved ? rotate_pairs(head, cosines, sines, rope.width, width, out)
                      : fused::rotate_head(rotation, head, cosines, sines, out);
  }
}

// to = f(gate)·up. Whole vectors: what lies past the width is the buffers' own and is never read.
template <typename F>
inline void gate_row(const float* gate, const float* up, std::int64_t width, float* to, F f) {
  for (std::int64_t i = 0; i < width; i += Vec::width) {
    const Vec active = f(Vec::load(gate + i));
    (up == nullptr ? active : active * Vec::load(up + i)).store(to + i);
  }
}

inline void activate(const ActivateOperation& op, std::int64_t width, const DecodeRow& row) {
  const float* gate = row.at(op.gate);
  const float* up = op.up.buffer < 0 ? nullptr : row.at(op.up);
  float* to = row.at(op.to);
  Vec slope;
  const auto relu = [](Vec x) { return max(Vec::of(0), x); };
  switch (op.function) {
    case Nonlinearity::silu:
      return gate_row(gate, up, width, to, [&](Vec x) { return fused::activate<Activation::silu>(x, &slope); });
    case Nonlinearity::gelu:
      return gate_row(gate, up, width, to, [&](Vec x) { return fused::activate<Activation::gelu>(x, &slope); });
    case Nonlinearity::gelu_tanh:
      return gate_row(gate, up, width, to, [&](Vec x) { return fused::activate<Activation::gelu_tanh>(x, &slope); });
    case Nonlinearity::quick_gelu:
      return gate_row(gate, up, width, to, [](Vec x) { return x * logistic(Vec::of(1.702f) * x); });
    case Nonlinearity::relu:
      return gate_row(gate, up, width, to, relu);
    case Nonlinearity::relu_squared:
      return gate_row(gate, up, width, to, [&](Vec x) { return relu(x) * relu(x); });
  }
}

// Rounds `count` numbers to bfloat16 where they lie.
inline void round_row(float* x, std::int64_t count) {
  alignas(64) BFloat16 rounded[Vec::width];
  std::int64_t i = 0;
  for (; i + Vec::width <= count; i += Vec::width) {
    Vec::load(x + i).store(rounded);
    Vec::load(rounded).store(x + i);
  }
  for (; i < count; ++i) {
    from_float(x[i], rounded);
    x[i] = to_float(rounded[0]);
  }
}

inline void do_row(const DecodeOperation& op, const DecodeRow& row) {
  Place to = op.embed.to;
  std::int64_t parts = 1;
  switch (op.kind) {
    case Operation::embed:
      embed(op.embed, op.width, row);
      break;
    case Operation::normalise:
      normalise(op.normalise, op.width, row);
      to = op.normalise.to;
      parts = op.normalise.groups;
      break;
    case Operation::add:
      add(op.add, op.width, row);
      to = op.add.to;
      break;
    case Operation::rotate:
      rotate(op.rotate, op.width, row);
      to = op.rotate.to;
      parts = op.rotate.heads;
      break;
    default:
      activate(op.activate, op.width, row);
      to = op.activate.to;
  }
  if (row.step.rounds) round_row(row.at(to), parts * op.width);
}

inline void pack_or_multiply(const DecodeOperation& op, const DecodeStep& step, int thread, int threads) {
  const DecodeRow first = {step, 0};
  SmallMatmul matmul = op.multiply.matmul;
  matmul.rows = step.rows;
  matmul.rounds = step.rounds;
  matmul.x = first.at(op.multiply.from);
  matmul.x_stride = step.strides[op.multiply.from.buffer];
  const std::int64_t shared = op.multiply.shared_pack;
  if (op.kind == Operation::pack) {
    small_matmul_kernels.pack(matmul, step.packs[shared], thread, threads);
    return;
  }
  matmul.out = first.at(op.multiply.to);
  matmul.out_stride = step.strides[op.multiply.to.buffer];
  const void* packed = shared < 0 ? nullptr : step.packs[shared];
  if (shared < 0) {
    void* own = thread_scratch(static_cast<std::size_t>(
        small_matmul_kernels.packed_bytes(matmul.rows, matmul.inputs, matmul.type)));
    small_matmul_kernels.pack(matmul, own, 0, 1);
    packed = own;
  }
  small_matmul_kernels.part(matmul, packed, thread, threads);
}

// Rows of heads of `size` numbers in an activation buffer.
inline TokenHeads heads_at(const DecodeStep& step, Place place, std::int64_t size) {
  return {DecodeRow{step, 0}.at(place), step.strides[place.buffer], size, false};
}

inline void write_or_attend(const DecodeOperation& op, const DecodeStep& step, int thread, int threads) {
  const AttendOperation& attend = op.attend;
  const BlockTables tables = step.tables[attend.group];
  const PagedRows rows = {step.rows, attend.heads, step.sequences, step.positions, tables.data, tables.stride};
  const KeyValuePool& pool = step.pools[attend.layer];
  if (op.kind == Operation::write) {
    attention_kernels.write_part(rows, pool, heads_at(step, attend.keys, pool.head_size),
                                 heads_at(step, attend.values, pool.value_size), thread, threads);
    return;
  }
  void* scratch = thread_scratch(static_cast<std::size_t>(attention_kernels.scratch_bytes(rows.heads, pool)));
  attention_kernels.attend_part(rows, pool, attend.shape, heads_at(step, attend.queries, pool.head_size),
                                heads_at(step, attend.to, pool.value_size), scratch, thread, threads);
}

void do_part(const DecodeOperation& op, const DecodeStep& step, int thread, int threads) {
  switch (op.kind) {
    case Operation::pack:
    case Operation::multiply:
      return pack_or_multiply(op, step, thread, threads);
    case Operation::write:
    case Operation::attend:
      return write_or_attend(op, step, thread, threads);
    default:
      for (std::int64_t r = step.rows * thread / threads; r < step.rows * (thread + 1) / threads; ++r) {
        do_row(op, {step, r});
      }
  }
}

constexpr DecodeKernels decode_kernels = {do_part};

}  // namespace
}  // namespace fastppo
