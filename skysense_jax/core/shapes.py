"""Names for the arrays that recur in signatures: what their axes are.

All of them are jax arrays. The names are for readers (and nothing checks them): a signature says `FeatureMap`, this
file says which axes that is, and a docstring adds what is special. Letters: B places or images, T dates, H W pixels,
h w cells of a grid, N or n sequences and their entries, C channels or bands, D width of features, K prototypes.
"""

from __future__ import annotations

import jax

Image = jax.Array  # [B, H, W, C] one image of each place
Series = jax.Array  # [B, T, H, W, C] the acquisitions of one sensor
FeatureMap = jax.Array  # [B, h, w, D] features of the cells of a grid
MapSeries = jax.Array  # [B, T, h, w, D] a feature map of every acquisition
Tokens = jax.Array  # [N, n, D] sequences of features
Windows = jax.Array  # [B, windows, w * w, D] the cells of a map by attention window, row-major
Features = jax.Array  # [..., D] feature vectors, whatever the axes in front
Logits = jax.Array  # [..., K] scores against K prototypes (or classes, clusters), before the softmax
Mask = jax.Array  # axes of what it masks, without channels; bool or number, False or 0 = does not count
Scalar = jax.Array  # [] one number
Key = jax.Array  # a typed random key (jax.random.key)
