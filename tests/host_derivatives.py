"""Host functions with derivatives derived by hand, for NumPy, and beside each a pure-JAX twin.

The formulas take arrays that all have the same leading dimensions; `host_endpoints.py` makes endpoints of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from foreign import Foreign


@dataclass(frozen=True)
class Smooth:
    """A foreign function that gives a dictionary, and its derivatives.

    `push(args, t, out)` are the output tangents, `pull(args, c, out)` the cotangents of the arguments, and
    `blocks(args, out)` the Jacobian. `second(args, t, u, out)` is the second derivative along two directions, and
    `second_pull(args, t, c, out)` its transpose in the second of them. `out` is the function's result.
    """

    foreign: Foreign
    results: Mapping[str, tuple[int, ...]]
    push: Callable[..., Any]
    pull: Callable[..., Any]
    blocks: Callable[..., Any]
    second: Callable[..., Any] | None = None
    second_pull: Callable[..., Any] | None = None

    @property
    def twin(self) -> Callable[..., Any]:
        """The same in JAX, for one element."""
        return self.foreign.twin


def _dot(a: Any, b: Any) -> Any:
    return np.sum(a * b, axis=-1)[..., None]


def _waves(xp: Any, x: Any, y: Any, s: Any) -> Any:
    mixed = xp.sin(x) * y * y * s[..., None] + xp.sum(x * y, axis=-1, keepdims=True) * xp.cos(y)
    return {"all": mixed, "y": y**3 + 2 * y, "x": xp.exp(-xp.sum(x * x, axis=-1))}


def _push_waves(args: Any, tangents: Any, out: Any) -> Any:
    (x, y, s), (tx, ty, ts) = args, tangents
    s, ts = s[..., None], ts[..., None]
    waves = np.cos(x) * tx * y * y * s + 2 * np.sin(x) * y * ty * s + np.sin(x) * y * y * ts
    turned = (_dot(tx, y) + _dot(x, ty)) * np.cos(y) - _dot(x, y) * np.sin(y) * ty
    return {"all": waves + turned, "y": (3 * y * y + 2) * ty, "x": -2 * _dot(x, tx)[..., 0] * out["x"]}


def _pull_waves(args: Any, cotangents: Any, out: Any) -> Any:
    x, y, s = args
    c, s, e = cotangents["all"], s[..., None], (cotangents["x"] * out["x"])[..., None]
    to_x = c * np.cos(x) * y * y * s + _dot(c, np.cos(y)) * y - 2 * x * e
    to_y = c * (2 * np.sin(x) * y * s - _dot(x, y) * np.sin(y)) + _dot(c, np.cos(y)) * x
    return to_x, to_y + cotangents["y"] * (3 * y * y + 2), np.sum(c * np.sin(x) * y * y, axis=-1)


def _blocks_of_waves(args: Any, out: Any) -> Any:
    x, y, s = args
    eye, s = np.eye(3), s[..., None]
    cosine, none = np.cos(y)[..., :, None], np.zeros_like(x)
    all_x = eye * (np.cos(x) * y * y * s)[..., None] + cosine * y[..., None, :]
    all_y = eye * (2 * np.sin(x) * y * s - _dot(x, y) * np.sin(y))[..., None] + cosine * x[..., None, :]
    y_y = eye * (3 * y * y + 2)[..., None]
    return {
        "all": (all_x, all_y, np.sin(x) * y * y),
        "y": (np.zeros_like(y_y), y_y, none),
        "x": (-2 * x * out["x"][..., None], none, np.zeros_like(out["x"])),
    }


def _second_of_waves(args: Any, t: Any, u: Any, out: Any) -> Any:
    (x, y, s), (tx, ty, ts), (ux, uy, us) = args, t, u
    s, ts, us, sin, cos = s[..., None], ts[..., None], us[..., None], np.sin(x), np.cos(x)
    waves = y * y * (cos * (tx * us + ux * ts) - sin * tx * ux * s) + 2 * sin * y * (ty * us + uy * ts)
    waves += 2 * s * (cos * y * (tx * uy + ux * ty) + sin * ty * uy)
    by_t, by_u = _dot(tx, y) + _dot(x, ty), _dot(ux, y) + _dot(x, uy)
    turned = (_dot(tx, uy) + _dot(ux, ty)) * np.cos(y) - (by_t * uy + by_u * ty) * np.sin(y)
    bent = out["x"] * (4 * _dot(x, tx) * _dot(x, ux) - 2 * _dot(tx, ux))[..., 0]
    return {"all": waves + turned - _dot(x, y) * np.cos(y) * ty * uy, "y": 6 * y * ty * uy, "x": bent}


def _second_pull_of_waves(args: Any, t: Any, cotangents: Any, out: Any) -> Any:
    (x, y, s), (tx, ty, ts), c = args, t, cotangents["all"]
    s, ts, sin, cos, e = s[..., None], ts[..., None], np.sin(x), np.cos(x), (cotangents["x"] * out["x"])[..., None]
    to_x = c * (y * y * (cos * ts - sin * tx * s) + 2 * s * cos * y * ty) + e * (4 * _dot(x, tx) * x - 2 * tx)
    to_x += _dot(c, np.cos(y)) * ty - _dot(c, np.sin(y) * ty) * y
    to_y = c * (2 * sin * y * ts + 2 * s * (cos * y * tx + sin * ty)) + 6 * cotangents["y"] * y * ty
    to_y += _dot(c, np.cos(y)) * tx - _dot(c, np.sin(y) * ty) * x
    to_y -= c * ((_dot(tx, y) + _dot(x, ty)) * np.sin(y) + _dot(x, y) * np.cos(y) * ty)
    return to_x, to_y, np.sum(c * (cos * tx * y * y + 2 * sin * y * ty), axis=-1)


# Arguments and outputs of several ranks; no two of its derivatives are alike, and its Jacobian is not symmetric.
WAVES = Smooth(
    Foreign("waves", _waves, ((3,), (3,), ())),
    {"all": (3,), "y": (3,), "x": ()},
    _push_waves,
    _pull_waves,
    _blocks_of_waves,
    _second_of_waves,
    _second_pull_of_waves,
)


def _roots(xp: Any, p: Any, q: Any) -> Any:
    bound = 1.5 * 3**0.5 * p * q[..., None]
    return {"z": 2 / 3**0.5 * xp.sinh(xp.arcsinh(bound) / 3)}


def _slope(out: Any) -> Any:
    return 1 / (3 * out["z"] ** 2 + 1)


def _moved(args: Any, tangents: Any) -> Any:
    return tangents[0] * args[1][..., None] + args[0] * tangents[1][..., None]


def _pull_roots(args: Any, cotangents: Any, out: Any) -> Any:
    adjoint = cotangents["z"] * _slope(out)
    return adjoint * args[1][..., None], np.sum(adjoint * args[0], axis=-1)


def _second_of_roots(args: Any, t: Any, u: Any, out: Any) -> Any:
    mixed = t[0] * u[1][..., None] + u[0] * t[1][..., None]
    curvature = -6 * out["z"] * _slope(out) ** 3
    return {"z": _slope(out) * mixed + curvature * _moved(args, t) * _moved(args, u)}


def _second_pull_of_roots(args: Any, t: Any, cotangents: Any, out: Any) -> Any:
    c, p, q = cotangents["z"], args[0], args[1][..., None]
    bent = -6 * out["z"] * _slope(out) ** 3 * _moved(args, t) * c
    return c * _slope(out) * t[1][..., None] + bent * q, np.sum(c * _slope(out) * t[0] + bent * p, axis=-1)


# The z with z³ + z = p q, by the implicit function theorem: the derivatives are written in the solution.
ROOTS = Smooth(
    Foreign("roots", _roots, ((3,), ())),
    {"z": (3,)},
    lambda args, t, out: {"z": _slope(out) * _moved(args, t)},
    _pull_roots,
    lambda args, out: {
        "z": (np.eye(3) * (_slope(out) * args[1][..., None])[..., None], _slope(out) * args[0]),
    },
    _second_of_roots,
    _second_pull_of_roots,
)
