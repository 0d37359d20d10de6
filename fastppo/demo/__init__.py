"""`fastppo demo`: a language model learns a tone from a reward, from nothing, in minutes."""
