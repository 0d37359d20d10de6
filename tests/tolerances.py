"""Tolerances of the tests, one place: absolute and relative, per dtype, for a handful of roundings in a row."""

import torch

# About 16 units in the last place for values near 1.
ATOL = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
RTOL = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}

# Figures recorded from TRL itself: its own fp32 arithmetic, in another order of operations.
GOLDEN_ATOL = 1e-5
# A whole optimisation step against TRL's.
STEP_ATOL = 1e-4


def close(dtype: torch.dtype, factor: float = 1.0) -> dict[str, float]:
    """Return atol= and rtol= of torch.testing.assert_close for this dtype, `factor` times as wide."""
    return {"atol": factor * ATOL[dtype], "rtol": factor * RTOL[dtype]}
