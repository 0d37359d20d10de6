// A fingerprint of a matrix of words that tells its rows and its columns apart.
#pragma once

#include <cstdint>

namespace fastppo {

// Σ_ij w_ij (i + j + 2) m modulo 2^64, for whole numbers w (rows, columns) side by side and an odd m. Sums of running sums
// weight by the column without a multiplication, which few processors do on vectors of 64 bits.
template <typename Word>
std::uint64_t checksum(const Word* words, std::int64_t rows, std::int64_t columns, std::uint64_t multiplier) {
  constexpr std::int64_t lanes = 8;
  const auto number = [](auto word) { return static_cast<std::uint64_t>(static_cast<std::int64_t>(word)); };
  const std::int64_t steps = columns / lanes;
  std::uint64_t total = 0;
  for (std::int64_t row = 0; row < rows; ++row, words += columns) {
    std::uint64_t sums[lanes] = {}, running[lanes] = {};  // running: Σ over steps k of (steps - k) w
    for (std::int64_t step = 0; step < steps; ++step) {
      for (std::int64_t i = 0; i < lanes; ++i) {
        sums[i] += number(words[step * lanes + i]);
        running[i] += sums[i];
      }
    }
    std::uint64_t sum = 0, weighted = 0;
    for (std::int64_t i = 0; i < lanes; ++i) {
      sum += sums[i];
      weighted += lanes * (number(steps) * sums[i] - running[i]) + number(i + 1) * sums[i];
    }
    for (std::int64_t column = steps * lanes; column < columns; ++column) {
      sum += number(words[column]);
      weighted += number(words[column]) * number(column + 1);
    }
    total += sum * number(row + 1) + weighted;
  }
  return total * multiplier;
}

}  // namespace fastppo
