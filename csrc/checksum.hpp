// A fingerprint of a matrix of words that tells its rows and its columns apart.
#pragma once

#include <cstdint>

namespace fastppo {

// Σ_ij w_ij (i + j + 2) m modulo 2^64, for whole numbers w (rows, columns) side by side and an odd m.
template <typename Word>
std::uint64_t checksum(const Word* words, std::int64_t rows, std::int64_t columns, std::uint64_t multiplier) {
  std::uint64_t total = 0;
  for (std::int64_t row = 0; row < rows; ++row, words += columns) {
    std::uint64_t sum = 0, weighted = 0;
    for (std::int64_t column = 0; column < columns; ++column) {
      const auto word = static_cast<std::uint64_t>(static_cast<std::int64_t>(words[column]));
      sum += word;
      weighted += word * static_cast<std::uint64_t>(column + 1);
    }
    total += sum * static_cast<std::uint64_t>(row + 1) + weighted;
  }
  return total * multiplier;
}

}  // namespace fastppo
