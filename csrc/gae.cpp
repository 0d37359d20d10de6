#include "gae.hpp"

namespace fastppo {

template <typename Real>
void gae(const Real* rewards, const Real* values, const std::int64_t* offsets, std::size_t num_segments, Real gamma,
         Real lam, Real* advantages) {
  const Real decay = gamma * lam;
  for (std::size_t segment = 0; segment < num_segments; ++segment) {
    Real next_value = 0;
    Real next_advantage = 0;
    for (std::int64_t t = offsets[segment + 1] - 1; t >= offsets[segment]; --t) {
      const Real delta = rewards[t] + gamma * next_value - values[t];
      next_advantage = delta + decay * next_advantage;
      next_value = values[t];
      advantages[t] = next_advantage;
    }
  }
}

template void gae<float>(const float*, const float*, const std::int64_t*, std::size_t, float, float, float*);
template void gae<double>(const double*, const double*, const std::int64_t*, std::size_t, double, double, double*);

}  // namespace fastppo
