"""A foreign likelihood in NumPyro: NUTS with four chains side by side, which share each call.

A Gaussian process explains a noisy series: how long are its waves, how high, and how large is the noise? NumPy gives
the likelihood, by Cholesky factors, and its gradient. The chains run under jax.vmap, so each step of all four is one
foreign call, not four.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS

import batchrules

jax.config.update("jax_enable_x64", True)

POINTS, CHAINS, WARMUP, SAMPLES = 30, 4, 100, 100
TIMES = np.linspace(0.0, 10.0, POINTS)
SQUARES = (TIMES[:, None] - TIMES) ** 2
SERIES = np.sin(1.3 * TIMES) + 0.3 * np.random.default_rng(0).normal(size=POINTS)

# --- the foreign code: log_scales is (..., 3), the logarithms of length, height and noise ----------------------------


def covariance(log_scales):
    length, height, noise = np.moveaxis(np.exp(2 * log_scales), -1, 0)[..., None, None]
    with np.errstate(divide="ignore", invalid="ignore"):  # a length of 0, below
        waves = height * np.exp(-SQUARES / (2 * length))
    return waves, waves + noise * np.eye(POINTS)


def log_likelihood(log_scales):
    factor = np.linalg.cholesky(covariance(log_scales)[1])
    white = np.linalg.solve(factor, SERIES[:, None])[..., 0]
    log_diagonal = np.log(np.diagonal(factor, axis1=-2, axis2=-1))
    return -0.5 * (white**2).sum(-1) - log_diagonal.sum(-1) - 0.5 * POINTS * np.log(2 * np.pi)


def likelihood_vjp(args, cotangents, needed):
    """Half the trace of (a aᵀ - C⁻¹) dC with a = C⁻¹ y: Rasmussen & Williams, Gaussian Processes, equation 5.9."""
    (log_scales,) = args
    waves, whole = covariance(log_scales)
    inverse = np.linalg.inv(whole)
    weights = inverse @ SERIES
    gap = 0.5 * (weights[..., :, None] * weights[..., None, :] - inverse)
    length, _, noise = np.moveaxis(np.exp(2 * log_scales), -1, 0)
    by_length = (gap * waves * SQUARES).sum((-2, -1)) / length
    by_height = 2 * (gap * waves).sum((-2, -1))
    by_noise = 2 * noise * np.trace(gap, axis1=-2, axis2=-1)
    return (cotangents[..., None] * np.stack([by_length, by_height, by_noise], axis=-1),)


# While it warms up, NUTS tries scales so extreme that there is no Cholesky factor. Such an element becomes NaN, which
# NUTS takes for a divergence of that chain; without on_error= it would be an error, and the end of all chains.
foreign = batchrules.host_call(
    log_likelihood, jax.ShapeDtypeStruct((), "float64"), signature="(p)->()", vjp=likelihood_vjp, on_error="nan"
)


def twin(log_scales):
    """The same in JAX, which differentiates it."""
    length, height, noise = jnp.exp(2 * log_scales)
    whole = height * jnp.exp(-SQUARES / (2 * length)) + noise * jnp.eye(POINTS)
    return jax.scipy.stats.multivariate_normal.logpdf(SERIES, jnp.zeros(POINTS), whole)


def model():
    log_scales = numpyro.sample("log_scales", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    numpyro.factor("series", foreign(log_scales))


def by_quadrature():
    """The posterior's means, by the twin on a grid that holds all but a trace of it."""
    axes = jnp.linspace(-2.0, 1.5, 20), jnp.linspace(-1.5, 2.0, 20), jnp.linspace(-2.5, -0.5, 20)
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    log_posterior = jax.lax.map(twin, grid, batch_size=1000) - 0.5 * (grid**2).sum(-1)
    return jax.nn.softmax(log_posterior) @ grid


def main():
    mcmc = MCMC(
        NUTS(model),
        num_warmup=WARMUP,
        num_samples=SAMPLES,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    with batchrules.record() as log, warnings.catch_warnings():
        warnings.simplefilter("ignore", batchrules.FailedElementsWarning)
        mcmc.run(jax.random.key(0))
        samples = np.asarray(mcmc.get_samples(group_by_chain=True)["log_scales"])

    mcmc.print_summary()
    batches = [call for call in log.calls if call.purpose == "batch"]
    alone = sum(call.elements for call in batches)
    failed = sum(call.failure is not None for call in log.calls if call.purpose == "retry")
    print(f"{CHAINS} chains of {WARMUP} + {SAMPLES} steps: {len(batches)} foreign calls, and not {alone}.")
    print(f"{failed} likelihoods or gradients failed and became NaN.")

    points = jnp.asarray(samples[0, ::10])
    np.testing.assert_allclose(jax.vmap(foreign)(points), jax.vmap(twin)(points), rtol=1e-9)
    gradients = jax.vmap(jax.grad(twin))(points)
    np.testing.assert_allclose(jax.vmap(jax.grad(foreign))(points), gradients, rtol=1e-7, atol=1e-7)
    errors = samples.std(axis=(0, 1)) / np.sqrt(effective_sample_size(samples))
    if not np.all(np.abs(samples.mean(axis=(0, 1)) - by_quadrature()) < 5 * errors):
        raise SystemExit(f"The means {samples.mean(axis=(0, 1))} are far from {by_quadrature()}.")
    print("Likelihoods and gradients agree with the twin in JAX, the samples with quadrature.")


if __name__ == "__main__":
    main()
