"""The errors that batchrules raises under names of its own."""

from __future__ import annotations


class BatchContractError(ValueError):
    """Foreign code was given a batch and did not return one.

    A vectorised method promises that every output leads with the size of the batch. This error names the function,
    the output, the shape that was expected and the one that came.

    Example:
        >>> import jax, jax.numpy as jnp, batchrules
        >>> total = batchrules.host_call(lambda x: x.sum(), jax.ShapeDtypeStruct((), "float32"), method="expand_dims")
        >>> try:
        ...     jax.vmap(total)(jnp.ones((4, 3)))
        ... except batchrules.BatchContractError as error:
        ...     print(str(error).partition("and ")[2].partition(". ")[0])
        the result has shape (): expected (4,) or (1,)
    """


class ResultError(ValueError):
    """A foreign function returned something other than its `result_shape` promised.

    Wrong structure, wrong number of outputs, wrong shape or wrong dtype.

    Example:
        >>> import jax, jax.numpy as jnp, batchrules
        >>> pair = batchrules.host_call(lambda x: x[:2], jax.ShapeDtypeStruct((3,), "float32"), name="pair")
        >>> try:
        ...     pair(jnp.ones(3))
        ... except batchrules.ResultError as error:
        ...     print(str(error).partition(". ")[0])
        host_call 'pair': the result has shape (2,), but result_shape promises (3,) for one element
    """


class ReadOnlyArgumentError(ValueError):
    """A host function wrote into one of its arguments, which JAX shares with the rest of the program.

    Example:
        >>> import jax.numpy as jnp, batchrules
        >>> @batchrules.host_call(result_shape=lambda x: x)
        ... def shift(x):
        ...     x += 1
        ...     return x
        >>> try:
        ...     shift(jnp.ones(3))
        ... except batchrules.ReadOnlyArgumentError as error:
        ...     print(str(error).partition(" (")[0])
        host_call 'shift' writes into one of its arguments
    """


class JaxInsideHostFunctionError(RuntimeError):
    """A host function used JAX, which can deadlock the program that called it.

    `allow_jax=True` lifts the check for functions that need it.

    Example:
        >>> import jax.numpy as jnp, numpy as np, batchrules
        >>> sine = batchrules.host_call(lambda x: np.asarray(jnp.sin(x)), lambda x: x, name="sine")
        >>> try:
        ...     sine(jnp.ones(3))
        ... except batchrules.JaxInsideHostFunctionError as error:
        ...     print(str(error).partition(". ")[0])
        host_call 'sine' uses JAX inside
    """


class ExportError(ValueError):
    """A program that calls a Python function was to be exported, which cannot be done.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, batchrules
        >>> from jax import export
        >>> sine = batchrules.host_call(np.sin, lambda x: x, name="sine")
        >>> try:
        ...     export.export(jax.jit(sine))(jnp.ones(3))
        ... except batchrules.ExportError as error:
        ...     print(str(error).partition(": ")[0])
        host_call 'sine' cannot be exported with jax.export
    """


class DerivativeError(TypeError):
    """A derivative was asked for that the foreign function does not have.

    Example:
        >>> import batchrules
        >>> issubclass(batchrules.MissingEndpointError, batchrules.DerivativeError)
        True
        >>> issubclass(batchrules.NotDifferentiableError, batchrules.DerivativeError)
        True
    """


class MissingEndpointError(DerivativeError, NotImplementedError):
    """A derivative was asked for that the foreign function has no endpoint for.

    Example:
        >>> import jax, numpy as np, batchrules
        >>> sine = batchrules.host_call(np.sin, lambda x: x, name="sine")
        >>> try:
        ...     jax.grad(sine)(1.0)
        ... except batchrules.MissingEndpointError as error:
        ...     print(str(error).partition(": ")[0])
        host_call 'sine' cannot be differentiated
    """


class NotDifferentiableError(DerivativeError, ValueError):
    """A derivative was asked for in an argument, or of an output, that is declared non-differentiable.

    Example:
        >>> import jax, batchrules
        >>> fixed = batchrules.ArraySpec((), differentiable=False)
        >>> double = batchrules.host_call(
        ...     lambda x: 2 * x, lambda x: x, schema={"x": fixed}, vjp=lambda args, ct, needed: (2 * ct,), name="double"
        ... )
        >>> try:
        ...     jax.grad(double)(1.0)
        ... except batchrules.NotDifferentiableError as error:
        ...     print(str(error).partition(": ")[0])
        host_call 'double' cannot be differentiated with respect to 'x'
    """


class ForeignCallError(RuntimeError):
    """Foreign code failed inside a compiled program.

    Names the function, the endpoint, the element, the shapes of its arguments, and the original error, which is its
    `__cause__`. Outside compiled programs the original error is raised, with this text as a note.

    Example:
        >>> import jax, jax.numpy as jnp, batchrules
        >>> def lookup(x):
        ...     raise LookupError("no such point")
        >>> search = jax.jit(batchrules.host_call(lookup, lambda x: x))
        >>> try:
        ...     jax.block_until_ready(search(jnp.float32(1.0)))
        ... except Exception as error:
        ...     print(str(error).strip().splitlines()[-1])
        ForeignCallError: host_call 'lookup' failed, with arguments x (): LookupError: no such point
    """


class BatchContractWarning(UserWarning):
    """Foreign code did not return a batch under `method="auto"`; it is called one element at a time from now on.

    Example:
        >>> import warnings, jax, jax.numpy as jnp, numpy as np, batchrules
        >>> unit = batchrules.host_call(lambda x: x / np.linalg.norm(x), lambda x: x, signature="(n)->(n)", name="unit")
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     print(jax.vmap(unit)(jnp.array([[3.0, 4.0], [0.0, 2.0]])))
        [[0.6 0.8]
         [0.  1. ]]
        >>> caught[0].category.__name__
        'BatchContractWarning'
    """


class FailedElementsWarning(UserWarning):
    """Elements of a batch failed, and are NaN because of `on_error="nan"`.

    Example:
        >>> import warnings, jax, jax.numpy as jnp, batchrules
        >>> @batchrules.host_call(result_shape=lambda x: x, on_error="nan")
        ... def root(x):
        ...     if x < 0:
        ...         raise ValueError("negative")
        ...     return x**0.5
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     print(jax.vmap(root)(jnp.array([4.0, -1.0])))
        [ 2. nan]
        >>> print(str(caught[0].message).partition(". ")[0])
        host_call 'root': 1 of 2 elements failed: (1,)
    """


class DispatchError(RuntimeError):
    """The executor failed, not the foreign code: a broken pool, one shut down too early, something it cannot pickle.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> import jax, jax.numpy as jnp, numpy as np, batchrules
        >>> with ThreadPoolExecutor(2) as pool:
        ...     sine = batchrules.host_call(np.sin, lambda x: x, executor=pool, name="sine")
        >>> try:
        ...     jax.vmap(sine)(jnp.ones(3))  # the pool is shut down
        ... except batchrules.DispatchError as error:
        ...     print(str(error).partition(": Runtime")[0])
        host_call 'sine': The executor (ThreadPoolExecutor) failed when 0 of 3 elements were done
    """
