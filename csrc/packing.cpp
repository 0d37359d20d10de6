#include "packing.hpp"

#include <functional>
#include <queue>
#include <utility>
#include <vector>

namespace fastppo {

void pack(const std::int64_t* lengths, std::size_t num_items, std::int64_t num_bins, std::int64_t max_per_bin,
          std::int64_t* bins) {
  // (tokens, index) pairs compare by tokens first, so the top of the heap is the answer with the tie rule included.
  using Bin = std::pair<std::int64_t, std::int64_t>;
  std::priority_queue<Bin, std::vector<Bin>, std::greater<Bin>> open;
  // Bins fill from the lowest index, so more bins than items can never receive anything.
  const auto useful = num_bins < static_cast<std::int64_t>(num_items) ? num_bins : static_cast<std::int64_t>(num_items);
  for (std::int64_t bin = 0; bin < useful; ++bin) {
    open.emplace(0, bin);
  }
  std::vector<std::int64_t> counts(static_cast<std::size_t>(useful), 0);
  for (std::size_t item = 0; item < num_items; ++item) {
    auto [tokens, bin] = open.top();
    open.pop();
    bins[item] = bin;
    if (++counts[static_cast<std::size_t>(bin)] < max_per_bin) {
      open.emplace(tokens + lengths[item], bin);
    }
  }
}

}  // namespace fastppo
