"""Derivatives as functions of flat arrays, and their batches: of a vmap, and a vmap of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batchrules import _testing_cases as cases
from batchrules._testing_cases import Case, Level
from batchrules._testing_leaves import Array, Leaf
from batchrules._testing_run import Flat, Subject, Target, Way, settle_like_leaves, settle_outputs, vmapped
from batchrules._testing_ways import Plan, Space, derived

# A Jacobian with more numbers is left out.
MOST_NUMBERS = 4096


@dataclass(frozen=True)
class Part:
    """What is differentiated: some outputs in some of the leaves.

    Attributes:
        count: How many leaves there are.
        moving: The leaves that have derivatives.
        seen: The outputs that have.
    """

    count: int
    moving: tuple[int, ...]
    seen: tuple[int, ...]

    def restricted(self, flat: Flat, args: Sequence[Any]) -> Flat:
        """The function of the moving leaves alone, that gives the seen outputs."""

        def function(*moved: Any) -> list[Any]:
            arrays = list(args)
            for position, array in zip(self.moving, moved, strict=True):
                arrays[position] = array
            outputs = flat(*arrays)
            return [outputs[i] for i in self.seen]

        return function

    def moved(self, args: Sequence[Any]) -> list[Any]:
        """The moving leaves."""
        return [args[i] for i in self.moving]

    def jvp(self, flat: Flat) -> Flat:
        """Output tangents, of the leaves and then the tangents."""

        def pushed(*arrays: Any) -> list[Any]:
            args, tangents = arrays[: self.count], arrays[self.count :]
            return jax.jvp(self.restricted(flat, args), self.moved(args), list(tangents))[1]

        return pushed

    def vjp(self, flat: Flat) -> Flat:
        """Cotangents of the moving leaves, of the leaves and then the cotangents of the seen outputs."""

        def pulled(*arrays: Any) -> list[Any]:
            args, cotangents = arrays[: self.count], arrays[self.count :]
            return list(jax.vjp(self.restricted(flat, args), *self.moved(args))[1](list(cotangents)))

        return pulled

    def grad(self, flat: Flat) -> Flat:
        """The gradient of the sum of all outputs."""

        def gradient(*args: Any) -> list[Any]:
            total = lambda *moved: _total(self.restricted(flat, args)(*moved))  # noqa: E731  # for grad alone
            return list(jax.grad(total, tuple(range(len(self.moving))))(*self.moved(args)))

        return gradient

    def jacobian(self, transform: Callable[..., Any]) -> Callable[[Flat], Flat]:
        """The blocks, output by output, by `jax.jacfwd` or `jax.jacrev`."""

        def derive(flat: Flat) -> Flat:
            def blocks(*args: Any) -> list[Any]:
                function = transform(self.restricted(flat, args), tuple(range(len(self.moving))))
                return [block for row in function(*self.moved(args)) for block in row]

            return blocks

        return derive


def _total(outputs: Sequence[Any]) -> Any:
    widest = max((jnp.real(output).dtype for output in outputs), key=lambda dtype: dtype.itemsize)
    total = jnp.zeros((), widest)
    for output in outputs:
        total += jnp.sum(jnp.real(output).astype(widest))
    return total


def direction(like: Leaf | Array, name: str, position: int, seed: int) -> Leaf:
    """A tangent or cotangent, of the size of what it belongs to."""
    value = like.value if isinstance(like, Leaf) else like
    random = np.random.default_rng([seed, position, 1])
    size = np.abs(value.astype(np.complex128))
    typical = float(size.max(initial=0.0, where=np.isfinite(size))) or 1.0
    parts = random.uniform(0.5, 1.0, (2, *value.shape)) * random.choice([-1.0, 1.0], (2, *value.shape))
    step = parts[0] + 1j * parts[1] if value.dtype.kind == "c" else parts[0]
    scaled = step * np.where(np.isfinite(size), size + 0.1 * typical, typical)
    return Leaf(name, scaled.astype(value.dtype), position, seed)


@dataclass(frozen=True, eq=False)
class Derivatives:
    """The derivatives of a target, each with its plan."""

    base: Target
    space: Space
    part: Part
    seed: int

    def jvp(self) -> tuple[Target, Plan]:
        """`jax.jvp`."""
        part, count = self.part, self.part.count
        tangents = self._tangents()
        vmap, jit = derived("jvp", part.jvp)
        of_vmap = Way("jvp of vmap", lambda subject, case: part.jvp(_mapped(subject, case, count)), settle_outputs)
        paired = [self._case(case, lambda level: part.moved(level.in_axes)) for case in self._cases]
        only_tangents = Case((Level(2, (*[None] * count, *[0] * len(tangents))),))
        plan = [
            (vmap, [only_tangents, *paired]),
            (jit, [only_tangents, *paired[-1:]]),
            (of_vmap, paired),
        ]
        outputs = [f"the tangent of {self.base.outputs[i]}" for i in part.seen]
        return self._target("jvp", part.jvp, outputs, tangents), plan

    def vjp(self) -> tuple[Target, Plan]:
        """`jax.vjp`."""
        part, count = self.part, self.part.count
        cotangents = self._cotangents()
        vmap, jit = derived("vjp", part.vjp)
        of_vmap = Way(
            "vjp of vmap", lambda subject, case: part.vjp(_mapped(subject, case, count)),
            settle_like_leaves(part.moving), part.moving,
        )  # fmt: skip
        full = [self._case(case, lambda level: [level.out_axis] * len(cotangents)) for case in self._cases]
        only = Case((Level(2, (*[None] * count, *[0] * len(cotangents))),))
        plan = [(vmap, [only, *full]), (jit, [only, *full[-1:]]), (of_vmap, full)]
        return self._target("vjp", part.vjp, self._names("the cotangent of {}"), cotangents), plan

    def grad(self) -> tuple[Target, Plan]:
        """`jax.grad` of the sum of all outputs."""
        part = self.part
        vmap, jit = derived("grad", part.grad)
        settle = settle_like_leaves(part.moving)
        of_vmap = Way("grad of vmap", lambda s, case: part.grad(vmapped(s.flat, case)), settle, part.moving)
        jit_of = Way(
            "jit of grad of vmap", lambda s, case: jax.jit(part.grad(vmapped(s.flat, case))), settle, part.moving
        )
        found = self._cases
        empty = [Case((Level(0, pattern),)) for pattern in self.space.zero_based]
        plan = [(vmap, found), (jit, found[-1:]), (of_vmap, [*found, *empty]), (jit_of, [found[0], found[-1]])]
        return self._target("grad", part.grad, self._names("the gradient in {}")), plan

    def jacobian(self, name: str, transform: Callable[..., Any]) -> tuple[Target, Plan]:
        """`jax.jacfwd` or `jax.jacrev`."""
        part = self.part
        derive = part.jacobian(transform)
        vmap, jit = derived(name, derive)
        of_vmap = Way(f"{name} of vmap", lambda subject, case: derive(vmapped(subject.flat, case)), self._settle_blocks)
        single = cases.one_level(self.space.zero_based, [2])
        outputs = [
            f"the derivative of {self.base.outputs[o]} in {self.base.leaves[m].name}"
            for o in part.seen
            for m in part.moving
        ]
        return self._target(name, derive, outputs), [(vmap, single), (jit, single[-1:]), (of_vmap, single)]

    @property
    def has_jacobian(self) -> bool:
        """Whether its Jacobian is real, and not too large."""
        ins = [self.base.leaves[i].value for i in self.part.moving]
        outs = [self.space.outputs[o] for o in self.part.seen]
        real = all(array.dtype.kind != "c" for array in [*ins, *outs])
        return real and sum(a.size for a in ins) * sum(a.size for a in outs) <= MOST_NUMBERS

    @property
    def _cases(self) -> list[Case]:
        """Batches for every derivative: each pattern once, some other axes, and two vmaps."""
        patterns = self.space.zero_based
        moved = cases.other_axes(patterns[-1:], self.base.leaves)
        nested = self.space.nested
        few = list(dict.fromkeys([patterns[0], patterns[-1]]))
        single = [*cases.one_level(patterns, [2]), *cases.one_level(few, [1, 3])]
        return [*single, *moved, *dict.fromkeys([nested[0], nested[-2]])]

    def _case(self, case: Case, axes: Callable[[Level], Sequence[int | None]]) -> Case:
        levels = tuple(replace(level, in_axes=(*level.in_axes, *axes(level))) for level in case.levels)
        return replace(case, levels=levels)

    def _tangents(self) -> list[Leaf]:
        leaves = [(i, self.base.leaves[i]) for i in self.part.moving]
        return [direction(leaf, f"the tangent of {leaf.name}", self.part.count + i, self.seed) for i, leaf in leaves]

    def _cotangents(self) -> list[Leaf]:
        return [
            direction(
                np.ones_like(self.space.outputs[o]), f"the cotangent of {self.base.outputs[o]}",
                self.part.count + o, self.seed,
            )
            for o in self.part.seen
        ]  # fmt: skip

    def _names(self, text: str) -> list[str]:
        return [text.format(self.base.leaves[i].name) for i in self.part.moving]

    def _target(
        self, name: str, derive: Callable[[Flat], Flat], outputs: Sequence[str], more: Sequence[Leaf] = ()
    ) -> Target:
        base = self.base
        label = f"the {name} of {base.subject.name}"
        return Target(base.subject, label, (*base.leaves, *more), derive, base.tolerance, tuple(outputs))

    def _settle_blocks(self, case: Case, outputs: list[Array]) -> list[Array]:
        """Block by block, what an element's outputs depend on, summed over the elements whose inputs these are.

        They should depend on their own alone; anything else is added to it, and shows.
        """
        settled = []
        pairs = [(o, m) for o in self.part.seen for m in self.part.moving]
        for block, (output, leaf) in zip(outputs, pairs, strict=True):
            mapped = bool(case.along(leaf))
            settled.append(block.sum(axis=1 + self.space.outputs[output].ndim) if mapped else block)
        return settled


def _mapped(subject: Subject, case: Case, count: int) -> Flat:
    """The function itself under the vmaps of a case, without the tangents or cotangents."""
    levels = tuple(replace(level, in_axes=level.in_axes[:count]) for level in case.levels)
    return vmapped(subject.flat, replace(case, levels=levels))
