// How sums become outputs: scales, bias, what is there already.
#pragma once

#include "small_matmul_words.inc.hpp"

namespace fastppo {
namespace {
namespace few_rows {

inline float as_bfloat16_if(bool rounds, float value) {
  BFloat16 rounded;
  from_float(value, &rounded);
  return rounds ? to_float(rounded) : value;
}

// What makes outputs of the sums of up to twelve of them.
struct Finish {
  std::int64_t count;
  bool accumulate, rounds;
  float factors[tile_outputs];
  float offsets[tile_outputs];

  Finish(const SmallMatmul& m, std::int64_t output, std::int64_t count) : count(count), accumulate(m.accumulate), rounds(m.rounds) {
    for (std::int64_t o = 0; o < count; ++o) {
      const std::int64_t n = output + o;
      factors[o] = is_int8(m.type) ? m.scale * m.row_scales[n] : m.scale;
      offsets[o] = m.bias == nullptr     ? 0.0f
                   : m.bias_is_bfloat16 ? to_float(static_cast<const BFloat16*>(m.bias)[n])
                                        : static_cast<const float*>(m.bias)[n];
    }
  }

  void write(const float* sums, float* out, std::int64_t outputs) const {
    for (std::int64_t o = 0; o < outputs; ++o) {
      const float value = sums[o] * factors[o] + offsets[o];
      out[o] = as_bfloat16_if(rounds, accumulate ? out[o] + value : value);
    }
  }

  // Write the outputs of `rows` rows from totals[outputs][lanes].
  void write_tile(const float* totals, std::int64_t lanes, std::int64_t rows, float* out, std::int64_t stride) const {
    float sums[4][tile_outputs];
    for (std::int64_t r = 0; r < rows; r += 4) {
      for (std::int64_t o = 0; o < tile_outputs; o += 4) {
        transpose(totals + o * lanes + r, lanes, &sums[0][o], tile_outputs);
      }
      for (std::int64_t i = 0; i < 4 && r + i < rows; ++i) {
        if (count == tile_outputs) {
          write(sums[i], out + (r + i) * stride, tile_outputs);
        } else {
          write(sums[i], out + (r + i) * stride, count);
        }
      }
    }
  }
};

}  // namespace few_rows
}  // namespace
}  // namespace fastppo
