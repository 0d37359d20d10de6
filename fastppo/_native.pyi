from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_Real = TypeVar("_Real", np.float32, np.float64)

def gae(
    rewards: NDArray[_Real], values: NDArray[_Real], offsets: NDArray[np.int64], gamma: float, lam: float
) -> NDArray[_Real]: ...
def pack(lengths: NDArray[np.int64], num_bins: int, max_per_bin: int) -> NDArray[np.int64]: ...
