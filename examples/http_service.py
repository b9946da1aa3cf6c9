"""A JSON-over-HTTP service as a JAX function: 8 workers, called from 16 threads, with gradients.

The service gives the pressure of a real gas (Peng-Robinson), and how it changes. Each answer takes 50 ms: think of a
database, a licence server or a model that someone else runs. It is started here and stopped at the end.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import httpx
import jax
import jax.numpy as jnp
import numpy as np

import batchrules

jax.config.update("jax_enable_x64", True)

# Carbon dioxide: critical temperature and pressure, acentric factor; the gas constant. SI units.
CRITICAL_T, CRITICAL_P, ACENTRIC, R = 304.13, 7.3773e6, 0.22394, 8.314462618

# A program of its own, which knows nothing of JAX.
SERVICE = """
import math, time
from fastapi import FastAPI
from pydantic import BaseModel, Field

T_C, P_C, ACENTRIC, R = 304.13, 7.3773e6, 0.22394, 8.314462618
A, B = 0.45724 * (R * T_C) ** 2 / P_C, 0.07780 * R * T_C / P_C
KAPPA = 0.37464 + 1.54226 * ACENTRIC - 0.26992 * ACENTRIC**2
app = FastAPI()

class State(BaseModel):
    temperature: float = Field(gt=0)  # K
    volume: float = Field(gt=B)  # m3/mol: nothing is smaller than its molecules

@app.post("/pressure")
def pressure(state: State):
    time.sleep(0.05)
    t, v = state.temperature, state.volume
    root = 1 + KAPPA * (1 - math.sqrt(t / T_C))
    return {"pressure": R * t / (v - B) - A * root**2 / (v * v + 2 * B * v - B * B)}

@app.post("/slopes")
def slopes(state: State):
    time.sleep(0.05)
    t, v = state.temperature, state.volume
    root, below = 1 + KAPPA * (1 - math.sqrt(t / T_C)), v * v + 2 * B * v - B * B
    by_temperature = R / (v - B) + A * root * KAPPA / math.sqrt(t * T_C) / below
    by_volume = -R * t / (v - B) ** 2 + A * root**2 * 2 * (v + B) / below**2
    return {"temperature": by_temperature, "volume": by_volume}
"""


@contextlib.contextmanager
def served(workers):
    """The URL of the service, which runs until the block ends."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        Path(folder, "gas.py").write_text(SERVICE)
        command = [sys.executable, "-m", "uvicorn", "gas:app", "--workers", str(workers), "--port", port]
        process = subprocess.Popen([*command, "--log-level", "error"], cwd=folder, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # the workers too
            process.wait()


def wait_for(url, process):
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{url}/openapi.json")
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit("The service did not start.")


def twin(temperature, volume):
    a, b = 0.45724 * (R * CRITICAL_T) ** 2 / CRITICAL_P, 0.07780 * R * CRITICAL_T / CRITICAL_P
    kappa = 0.37464 + 1.54226 * ACENTRIC - 0.26992 * ACENTRIC**2
    root = 1 + kappa * (1 - jnp.sqrt(temperature / CRITICAL_T))
    return R * temperature / (volume - b) - a * root**2 / (volume**2 + 2 * b * volume - b**2)


def main():
    with served(workers=8) as url, httpx.Client(base_url=url, timeout=30) as client:

        def ask(path, temperature, volume):
            answer = client.post(path, json={"temperature": float(temperature), "volume": float(volume)})
            return answer.raise_for_status().json()

        def pressure(temperature, volume):
            return ask("/pressure", temperature, volume)["pressure"]

        def slopes(args, cotangents, needed):
            found = ask("/slopes", *args)
            return cotangents * found["temperature"], cotangents * found["volume"]

        number = jax.ShapeDtypeStruct((), "float64")
        one_by_one = batchrules.host_call(pressure, number)
        gas = batchrules.host_call(pressure, number, vjp=slopes, executor=16, on_error="nan")

        states = jnp.linspace(280.0, 400.0, 32), jnp.geomspace(5e-5, 5e-3, 32)
        for words, function in (("one by one", jax.vmap(one_by_one)), ("16 threads", jax.vmap(gas))):
            start = time.perf_counter()
            pressures = jax.block_until_ready(function(*states))
            print(f"32 pressures, {words}: {time.perf_counter() - start:.2f} s")

        gradients = jax.jit(jax.vmap(jax.grad(gas, (0, 1))))(*states)

        # The service refuses a volume that is too small (422). That costs this element, and no other.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            partly = np.asarray(jax.vmap(gas, (None, 0))(300.0, jnp.array([1e-3, 1e-6, 2e-3])))
        print(f"{partly} Pa\n{str(caught[-1].message).splitlines()[0]}")

    np.testing.assert_allclose(pressures, twin(*states), rtol=1e-12)
    np.testing.assert_allclose(gradients, jax.vmap(jax.grad(twin, (0, 1)))(*states), rtol=1e-10)
    np.testing.assert_array_equal(np.isnan(partly), [False, True, False])
    print("Pressures and gradients agree with the twin in JAX.")


if __name__ == "__main__":
    main()
