"""Model FLOPs, the numerator of MFU: the formulas of layers, and a counter of the products in a traced function.

What is counted: every multiply-accumulate of a matrix product or convolution as 2 FLOPs (linear layers, attention
logits and values, patch embedding, heads, prototypes, alignment, the objective's own products); padding that the
architecture itself asks for (Swin windows). Forward + backward of the student = 3 x forward; the teacher and everything
without gradient = 1 x forward. What is not counted: rematerialisation (it is a choice, not work the model needs),
normalisations, softmax, elementwise work, the optimiser. Backward products that nobody needs (gradients of the input
images) are counted by the 3 x convention; they are below 1 %. A test holds these formulas against the products in the
traced step.
"""

from __future__ import annotations

import math
from typing import Any

TRAINED = 3.0
"""Forward + backward in units of the forward pass."""


def linear(rows: float, d_in: float, d_out: float) -> float:
    """FLOPs of a linear layer.

    Args:
        rows: vectors that it multiplies.
        d_in: their width before it.
        d_out: their width after it.

    Returns:
        FLOPs of the forward pass.
    """
    return 2.0 * rows * d_in * d_out


def attention(rows: float, keys: float, width: float) -> float:
    """FLOPs of an attention's logits and values over all heads; its projections are counted apart.

    Args:
        rows: queries.
        keys: keys that each query sees.
        width: of queries, keys and values, all heads together.

    Returns:
        FLOPs of the forward pass.
    """
    return 4.0 * rows * keys * width


def mlp(rows: float, width: float, ratio: float) -> float:
    """FLOPs of two linear layers width -> ratio * width -> width.

    Args:
        rows: vectors that they multiply.
        width: of the vectors.
        ratio: hidden width in units of `width`.

    Returns:
        FLOPs of the forward pass.
    """
    return 2.0 * linear(rows, width, int(width * ratio))


def transformer(sequences: float, tokens: float, width: float, depth: int, ratio: float) -> float:
    """FLOPs of plain transformer layers.

    Args:
        sequences: how many sequences.
        tokens: of each sequence.
        width: of a token.
        depth: how many layers.
        ratio: hidden width of the MLP in units of `width`.

    Returns:
        FLOPs of the forward pass.
    """
    rows = sequences * tokens
    return depth * (linear(rows, width, 4 * width) + attention(rows, tokens, width) + mlp(rows, width, ratio))


def of_jaxpr(jaxpr: Any) -> float:
    """FLOPs of all matrix products in a traced function as it is written, rematerialisation included.

    The body of a scan counts times its length.

    Raises:
        ValueError: the function has a convolution; this package has none (nn.patch cuts patches by reshaping).
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "conv_general_dilated":
            raise ValueError("convolutions are not counted")
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * of_jaxpr(inner)
    return total
