// Generalised advantage estimation over ragged sequences laid end to end.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastppo {

// delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1} within each segment; both V and A are zero
// after a segment's last token. rewards, values, advantages: (T,); offsets: (num_segments + 1,), from 0 to T and never
// falling. advantages may not overlap the inputs. Source: Schulman et al. 2016, arXiv:1506.02438, equations 11 and 16.
template <typename Real>
void gae(const Real* rewards, const Real* values, const std::int64_t* offsets, std::size_t num_segments, Real gamma,
         Real lam, Real* advantages);

}  // namespace fastppo
