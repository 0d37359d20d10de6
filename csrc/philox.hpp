// Philox-4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include <cstdint>

namespace fastppo {
namespace {

struct Words {
  std::uint32_t at[4];
};

// The four words that belong to a counter under a 64-bit seed.
inline Words philox(std::uint64_t seed, Words c) {
  std::uint32_t key_a = static_cast<std::uint32_t>(seed), key_b = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xD2511F53ull * c.at[0], b = 0xCD9E8D57ull * c.at[2];
    c = {{static_cast<std::uint32_t>(b >> 32) ^ c.at[1] ^ key_a, static_cast<std::uint32_t>(b),
          static_cast<std::uint32_t>(a >> 32) ^ c.at[3] ^ key_b, static_cast<std::uint32_t>(a)}};
    key_a += 0x9E3779B9u;
    key_b += 0xBB67AE85u;
  }
  return c;
}

// The number of (0, 1) that draws the token at a position of a request.
inline double uniform(std::uint64_t seed, std::int64_t request, std::int64_t position) {
  const auto number = static_cast<std::uint64_t>(request);
  const Words counter = {{static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(number),
                          static_cast<std::uint32_t>(number >> 32), 0}};
  return (philox(seed, counter).at[0] + 0.5) * 0x1p-32;
}

}  // namespace
}  // namespace fastppo
