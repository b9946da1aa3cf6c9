"""Two served Tesseracts in a row, with an optimiser around them: the stiffest beam for its weight.

One Tesseract turns five design variables into the thickness of a cantilever along its length. The other bends it. Optax
improves eight designs at once: a step is one request for each endpoint, whatever the number of designs. Tesseracts
mostly run in containers; here tesseract-core's runtime serves them on this machine, without Docker.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from batchrules_tesseract import TesseractClient, TesseractUnreachableError, apply_tesseract

import batchrules

jax.config.update("jax_enable_x64", True)

ALONG = (np.arange(50) + 0.5) / 50  # the sections of the beam

# The tesseract_api.py of each. Its arrays may have any shape (`...`), which is what allows a batch in one request.
COMMON = """
import numpy as np
from pydantic import BaseModel
from tesseract_core.runtime import Array, Differentiable, Float64, ShapeDType

ALONG = (np.arange(50) + 0.5) / 50
"""
PROFILE = (
    COMMON
    + """
HATS = np.maximum(0.0, 1.0 - np.abs(4 * ALONG[:, None] - np.arange(5)))

class InputSchema(BaseModel):
    design: Differentiable[Array[..., Float64]]

class OutputSchema(BaseModel):
    thickness: Differentiable[Array[..., Float64]]

def apply(inputs: InputSchema) -> OutputSchema:
    return OutputSchema(thickness=np.exp(inputs.design @ HATS.T))

def vector_jacobian_product(inputs: InputSchema, vjp_inputs, vjp_outputs, cotangent_vector):
    return {"design": (cotangent_vector["thickness"] * np.exp(inputs.design @ HATS.T)) @ HATS}

def abstract_eval(abstract_inputs):
    return {"thickness": ShapeDType(shape=(*abstract_inputs.design.shape[:-1], 50), dtype="float64")}
"""
)
BEAM = (
    COMMON
    + """
# A load at the tip bends a section by (1 - x) / thickness**3, and that moves the tip (1 - x) times as much.
LEVER = (1.0 - ALONG) ** 2 / 50

class InputSchema(BaseModel):
    thickness: Differentiable[Array[..., Float64]]

class OutputSchema(BaseModel):
    deflection: Differentiable[Array[..., Float64]]

def apply(inputs: InputSchema) -> OutputSchema:
    return OutputSchema(deflection=(LEVER / inputs.thickness**3).sum(-1))

def vector_jacobian_product(inputs: InputSchema, vjp_inputs, vjp_outputs, cotangent_vector):
    return {"thickness": -3 * LEVER / inputs.thickness**4 * cotangent_vector["deflection"][..., None]}

def abstract_eval(abstract_inputs):
    return {"deflection": ShapeDType(shape=abstract_inputs.thickness.shape[:-1], dtype="float64")}
"""
)


@contextlib.contextmanager
def served(source):
    """A Tesseract, which runs until the block ends."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        api = Path(folder, "tesseract_api.py")
        api.write_text(source)
        settings = {**os.environ, "TESSERACT_API_PATH": str(api), "TESSERACT_OUTPUT_PATH": folder}
        command = [sys.executable, "-m", "tesseract_core.runtime", "serve", "--host", "127.0.0.1", "--port", port]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env=settings, start_new_session=True, **quiet)
        try:
            yield TesseractClient(f"http://127.0.0.1:{port}")
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def wait_for(tesseract):
    for _ in range(600):
        with contextlib.suppress(TesseractUnreachableError):
            tesseract.health()
            return
        time.sleep(0.1)
    raise SystemExit(f"{tesseract} did not start.")


def product(deflection, thickness):
    """What to minimise: the deflection times the cube of the weight, which does not depend on the scale."""
    return deflection * jnp.mean(thickness) ** 3


def twin(design):
    hats = jnp.maximum(0.0, 1.0 - jnp.abs(4 * ALONG[:, None] - jnp.arange(5)))
    thickness = jnp.exp(hats @ design)
    return product(jnp.mean((1 - ALONG) ** 2 / thickness**3), thickness)


def optimised(objective, designs, steps=100):
    optimiser = optax.adam(0.1)

    @jax.jit
    def step(designs, state):
        products, gradients = jax.vmap(jax.value_and_grad(lambda design: jnp.log(objective(design))))(designs)
        updates, state = optimiser.update(gradients, state)
        return optax.apply_updates(designs, updates), state, jnp.exp(products)

    state = optimiser.init(designs)
    for _ in range(steps):
        designs, state, products = step(designs, state)
    return jax.block_until_ready((designs, products))


def main():
    starts = jnp.asarray(0.5 * np.random.default_rng(0).normal(size=(8, 5)))
    with served(PROFILE) as profile, served(BEAM) as beam:
        wait_for(profile)
        wait_for(beam)

        def pipeline(design):
            thickness = apply_tesseract(profile, {"design": design}, vmap_method="auto")["thickness"]
            deflection = apply_tesseract(beam, {"thickness": thickness}, vmap_method="auto")["deflection"]
            return product(deflection, thickness)

        with batchrules.record() as log:
            designs, products = optimised(pipeline, starts)

    print(
        f"100 steps with 8 designs: {len(log.calls)} requests, {sum(call.elements for call in log.calls)} evaluations"
    )
    best = jnp.argmin(products)
    print(f"deflection x weight³: {products[best]:.4f} for the best of them, {twin(jnp.zeros(5)):.4f} for a plain bar,")
    print(f"{(2 / 3) ** 4:.4f} for the best of all shapes, a root. Thickness {np.round(np.exp(designs[best]), 2)}")

    twin_designs, twin_products = optimised(twin, starts)
    np.testing.assert_allclose(designs, twin_designs, atol=1e-8)
    np.testing.assert_allclose(products, twin_products, atol=1e-10)
    print("Designs agree with those that the twin in JAX leads to.")


if __name__ == "__main__":
    main()
