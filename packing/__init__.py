"""Length histograms, pack plans and packed datasets: NumPy, Numba and Arrow, no tensors."""
