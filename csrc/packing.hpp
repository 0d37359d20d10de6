// Packing of sequences into minibatches of even token count.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastppo {

// Gives each item, in the given order, to the bin with the fewest tokens among those that hold fewer than max_per_bin
// items; ties go to the lowest bin index. lengths, bins: (num_items,). Needs num_bins >= 1 and
// num_bins * max_per_bin >= num_items: with less room there is no answer, and the caller checks.
void pack(const std::int64_t* lengths, std::size_t num_items, std::int64_t num_bins, std::int64_t max_per_bin,
          std::int64_t* bins);

}  // namespace fastppo
