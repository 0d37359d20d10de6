"""One network, many parts: value heads, adapters, the reference, and the passes that train and score them."""
