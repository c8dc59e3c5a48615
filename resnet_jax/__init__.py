"""Deep residual learning (He et al. 2015) in JAX and Flax."""
