"""One reference case: its arrays, the settings in its `meta_json`, its inputs; and what every kind of case needs to
build a module from a reference constructor's arguments and to differentiate it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from skysense_jax.convert import keymap
from skysense_jax.convert.torch_export import state_from_params
from skysense_jax.convert.torch_import import fill

Arrays = dict[str, Any]
"""Computed arrays in the file's names: y..., dx..., d:<torch key>."""


class Variant(NamedTuple):
    """One input of a case: its name ("" for `x`), its array, and the settings that `meta_json.inputs` states for it
    alone.
    """

    name: str
    x: np.ndarray
    settings: dict[str, Any]


class Case(NamedTuple):
    """One file: its arrays, its meta_json, and the dtype to compute in."""

    arrays: Mapping[str, np.ndarray]
    meta: dict[str, Any]
    dtype: str = "float32"

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """torch key -> tensor of the official module."""
        return {k[2:]: v for k, v in self.arrays.items() if k.startswith("w:")}

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        """`meta_json.inputs`: name of an input -> its settings. Raises ValueError where it is anything else."""
        stated = self.meta.get("inputs") or {}
        if not isinstance(stated, Mapping) or not all(isinstance(v or {}, Mapping) for v in stated.values()):
            raise ValueError(
                f'meta_json.inputs is {stated!r}; write {{"NAME": {{"SETTING": VALUE}}}} for the input x_NAME'
            )
        named = {}
        for name, settings in stated.items():
            plain = name if f"x_{name}" in self.arrays else re.sub("^x_?", "", name) if name in self.arrays else name
            named[plain] = dict(settings or {})
        return named

    def has(self, prefix: str) -> list[str]:
        """Names of the arrays that begin so."""
        return [k for k in self.arrays if k.startswith(prefix)]

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting, written beside `args` in meta_json or in it.

        Raises:
            ValueError: where it is missing and has no default, or is written twice with different values.
        """
        values = [place[name] for place in (self.meta, self.meta.get("args") or {}) if name in place]
        if not values and default is None:
            raise ValueError(
                f"meta_json lacks {name!r}, which kind {self.meta['kind']!r} needs; write it beside `args`"
            )
        if any(value != values[0] for value in values):
            raise ValueError(f"meta_json states {name!r} twice, {values[0]!r} and {values[1]!r}; keep the right one")
        return values[0] if values else default

    def arguments(self, variant: Variant) -> dict[str, Any]:
        """The reference constructor's arguments for one input: `args`, overridden by what the input states."""
        return {**(self.meta.get("args") or {}), **variant.settings}

    def variants(self) -> list[Variant]:
        """The inputs: `x_NAME` each, or `x`. An input that meta_json names and that has no array of its own is `x`.

        Raises:
            ValueError: for an input without an array, or a stated shape that is not the array's.
        """
        stated = self.inputs
        stored = [re.sub("^x_?", "", key) for key in self.arrays if re.match("x(_|$)", key)]
        outputs_of_x = any(re.fullmatch(r"y(_(cls|nocls))?(_\d+)?", key) for key in self.arrays)
        names = [*stated, *(n for n in stored if n not in stated and (n or not stated or outputs_of_x))]
        return [self._variant(name, dict(stated.get(name, {}))) for name in names]

    def _variant(self, name: str, settings: dict[str, Any]) -> Variant:
        x = self.arrays.get(join("x", name), self.arrays.get("x"))
        if x is None:
            raise ValueError(f"meta_json.inputs names {name!r}, but the file holds neither x_{name} nor x; store one")
        shape = tuple(settings.pop("shape", x.shape))
        if shape != x.shape[len(x.shape) - len(shape) :]:
            raise ValueError(
                f"meta_json.inputs.{name}.shape is {shape}, the array {join('x', name)} has {x.shape}; correct one"
            )
        return Variant(name, x, settings)

    def cotangent(self, *parts: Any) -> np.ndarray | None:
        """The array `g_...` or `g_y_...` of an output's name without its "y"; None where it is not weighed."""
        return self.arrays.get(join("g", "y", *parts), self.arrays.get(join("g", *parts)))


# ------------------------------------------------------------------------------------------------- names and layouts
def join(*parts: Any) -> str:
    """Parts of an array's name, the empty ones left out."""
    return "_".join(str(p) for p in parts if p != "")


def runs(case: Case, variant: Variant, words: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Variant]]:
    """The runs of one input: where array names carry a variant, a run for each.

    Args:
        case: whose outputs are named.
        variant: the input.
        words: word in a name -> the arguments it stands for ("nopad" -> pad_small_map false).

    Returns:
        (word after the input's name in its outputs, or "", and the input with the arguments of that run). A word in the
        input's own name stands for its arguments too, where `inputs` does not state them.
    """
    names = {w: join(variant.name, w) for w in words}
    inputs = {*case.inputs, *(k[2:] for k in case.has("x_"))}
    carried = [
        w
        for w, name in names.items()
        if name not in inputs and any(re.match(rf"y_{re.escape(name)}(_|$)", key) for key in case.arrays)
    ]
    named_settings = {k: v for w in variant.name.split("_") for k, v in words.get(w, {}).items()}
    plain = variant._replace(settings=named_settings | variant.settings)
    return [(w, plain._replace(settings=plain.settings | words[w])) for w in carried] or [("", plain)]


def output_names(case: Case, prefix: str, indices: Sequence[int]) -> list[str]:
    """Names of a module's outputs without their "y_", one per entry of `indices` (the reference's out_indices).

    A file counts the entries (0, 1, ...), or, where its numbers say so, writes the indices; a single output may have no
    number.
    """
    pattern = join("[yg]", re.escape(prefix), r"(\d+)")
    stored = {int(match.group(1)) for key in case.arrays if (match := re.fullmatch(pattern, key))}
    if not stored and len(indices) == 1:
        return [prefix]
    counted = not stored <= set(indices) or stored <= set(range(len(indices)))
    return [join(prefix, number) for number in (range(len(indices)) if counted else indices)]


def nhwc(x: np.ndarray) -> jax.Array:
    """[..., C, H, W] -> [..., H, W, C]."""
    return jnp.asarray(np.moveaxis(x, -3, -1))


def nchw(x: Any) -> np.ndarray:
    """[..., H, W, C] -> [..., C, H, W]."""
    return np.moveaxis(np.asarray(x), -1, -3)


def merged(parts: Iterable[Arrays]) -> Arrays:
    """All arrays of several inputs; the gradients of a weight add up, as the reference accumulates them."""
    out: Arrays = {}
    for part in parts:
        out |= {k: v + out[k] if k.startswith("d:") and k in out else v for k, v in part.items()}
    return out


# --------------------------------------------------------------------------------------------------------- arguments
PASSIVE = ("drop_rate", "attn_drop_rate", "drop_path_rate", "with_cp", "norm_eval", "init_cfg", "pretrained", "act_cfg")
"""Constructor arguments that do not matter in eval mode: rates of dropout, checkpoints to begin with."""


def take(args: Mapping[str, Any], fixed: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Constructor arguments with the reference's defaults.

    Args:
        args: what the file states.
        fixed: arguments of which one value only is built here.
        **defaults: arguments any value of which is built.

    Returns:
        The values of `defaults`, replaced by those of `args`.

    Raises:
        ValueError: for an argument that is not known, or another value of a fixed one.
    """
    for key, value in args.items():
        if key in fixed and value != fixed[key]:
            raise ValueError(f"{key}={value!r} is not built here; only {fixed[key]!r} is")
        if key not in fixed and key not in defaults and key not in PASSIVE:
            raise ValueError(
                f"unknown constructor argument {key}={value!r} in meta_json (args, cfg or the settings of an input); "
                f"known are {', '.join([*defaults, *fixed, *PASSIVE])}. Correct its name, or teach tests/parity to "
                "build it"
            )
    return {key: args.get(key, value) for key, value in defaults.items()}


def eps_of(norm_cfg: Mapping[str, Any] | None) -> float:
    """The eps of a mmcv norm configuration; torch's where it states none."""
    return float((norm_cfg or {}).get("eps", 1e-5))


# ------------------------------------------------------------------------------------------------------- parameters
def load(module: Any, entries: Sequence[keymap.Entry], weights: Mapping[str, np.ndarray], shape: Sequence[int]) -> Any:
    """Parameters of a module through the importer; `shape` is that of an input it accepts."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape)))["params"]
    return fill(weights, entries, shapes).params


def with_class_rows(
    weights: Mapping[str, np.ndarray], grids: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Weights whose position tables all have the row of the class token: zeros where a table holds its grid alone.

    Args:
        weights: torch key -> tensor.
        grids: torch key of a position table -> its (rows, columns).

    Returns:
        The weights, and the keys of the tables that got a row.
    """
    added = [key for key, (h, w) in grids.items() if key in weights and weights[key].shape[1] == h * w]
    rows = {key: np.concatenate([np.zeros_like(weights[key][:, :1]), weights[key]], axis=1) for key in added}
    return {**weights, **rows}, added


def without_class_rows(gradients: Arrays, added: Iterable[str]) -> Arrays:
    """Gradients in the shapes of the file: without the rows that :func:`with_class_rows` added."""
    return gradients | {f"d:{key}": gradients[f"d:{key}"][:, 1:] for key in added if f"d:{key}" in gradients}


def differentiate(
    run: Callable[[Any, Any], Any],
    weigh: Callable[[Any], Any],
    params: Any,
    inputs: Any,
    entries: Sequence[keymap.Entry],
) -> tuple[Any, Any, Arrays, Any]:
    """One compilation for outputs = run(params, inputs) and the scalar weigh(outputs).

    Returns:
        (outputs, scalar, {"d:<torch key>": gradient}, gradient of the inputs).
    """

    def loss(p: Any, x: Any) -> tuple[Any, Any]:
        outputs = run(p, x)
        return weigh(outputs), outputs

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, outputs), (d_params, d_inputs) = both(params, inputs)
    return outputs, value, {f"d:{k}": v for k, v in state_from_params(d_params, entries).items()}, d_inputs
