"""A C++ kernel under jax.vmap and jax.grad: isotonic regression, by `register` and by `device_call`.

Isotonic regression finds the increasing sequence nearest to some data: a dose-response curve, or a calibration curve.
Its algorithm pools neighbours until they are in order: short in C++, and nothing that `jax.lax` is good at.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import batchrules

jax.config.update("jax_platforms", "cpu")  # where the kernel runs
jax.config.update("jax_enable_x64", True)

KERNELS = r"""
#include <atomic>
#include <cstdint>
#include <vector>
#include "xla/ffi/api/ffi.h"
namespace ffi = xla::ffi;
using Rows = ffi::Buffer<ffi::F64>;
using Result = ffi::ResultBuffer<ffi::F64>;
struct Block { double sum; size_t size; double mean() const { return sum / size; } };

std::atomic<int64_t> calls{0};
extern "C" int64_t CallsMade() { return calls; }

// Each row on its own: pool a block with the one before it while their means are out of order.
ffi::Error Isotonic(Rows data, Result fit) {
  ++calls;
  const size_t n = data.dimensions().back();
  for (size_t start = 0; start < data.element_count(); start += n) {
    std::vector<Block> blocks;
    for (size_t i = 0; i < n; ++i) {
      Block last{data.typed_data()[start + i], 1};
      for (; !blocks.empty() && blocks.back().mean() >= last.mean(); blocks.pop_back())
        last = {blocks.back().sum + last.sum, blocks.back().size + last.size};
      blocks.push_back(last);
    }
    double* out = fit->typed_data() + start;
    for (const Block& block : blocks) for (size_t i = 0; i < block.size; ++i) *out++ = block.mean();
  }
  return ffi::Error::Success();
}

// The derivative along a direction: its mean over each block of a fit. The matrix is symmetric, so this is the vjp too.
ffi::Error BlockMeans(Rows fit, Rows direction, Result means) {
  ++calls;
  const size_t n = fit.dimensions().back();
  for (size_t start = 0; start < fit.element_count(); start += n) {
    const double *row = fit.typed_data() + start, *moved = direction.typed_data() + start;
    for (size_t from = 0, to = 0; from < n; from = to) {
      double sum = 0;
      for (; to < n && row[to] == row[from]; ++to) sum += moved[to];
      for (size_t i = from; i < to; ++i) means->typed_data()[start + i] = sum / (to - from);
    }
  }
  return ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(IsotonicHandler, Isotonic, ffi::Ffi::Bind().Arg<Rows>().Ret<Rows>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(BlockMeansHandler, BlockMeans, ffi::Ffi::Bind().Arg<Rows>().Arg<Rows>().Ret<Rows>());
"""


def build():
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        raise SystemExit("This example needs a C++17 compiler: none found (CXX, c++, g++, clang++).")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "kernels.cc"), Path(folder, "kernels.so")
        source.write_text(KERNELS)
        options = ["-std=c++17", "-O2", "-fPIC", "-shared", "-isystem", jax.ffi.include_dir()]
        subprocess.run([compiler, *options, source, "-o", library], check=True)
        return ctypes.CDLL(str(library))


library = build()
jax.ffi.register_ffi_target("isotonic", jax.ffi.pycapsule(library.IsotonicHandler), platform="cpu")
jax.ffi.register_ffi_target("block_means", jax.ffi.pycapsule(library.BlockMeansHandler), platform="cpu")


def isotonic(data):
    """As a library might have it: no vmap_method, so jax.vmap refuses it."""
    return jax.ffi.ffi_call("isotonic", jax.ShapeDtypeStruct(data.shape, data.dtype))(data)


def block_means(fit, direction):
    return jax.ffi.ffi_call("block_means", jax.ShapeDtypeStruct(fit.shape, fit.dtype))(fit, direction)


# With its derivatives. They too are given a whole batch at once, every array of it with the same leading size.
isotonic_fit = batchrules.device_call(
    isotonic,
    method="broadcast_all",
    jvp=lambda args, tangents: block_means(isotonic(*args), tangents[0]),
    vjp=lambda args, cotangents, needed: (block_means(isotonic(*args), cotangents),),
)


def twin(data):
    """The same in JAX, in memory and time O(n²): the largest, over starts, of the smallest mean up to an end."""
    total = jnp.concatenate([jnp.zeros(1), jnp.cumsum(data)])
    start, end = jnp.arange(data.size)[:, None], jnp.arange(data.size)[None, :]
    means = jnp.where(end >= start, (total[None, 1:] - total[:-1, None]) / jnp.maximum(end - start + 1, 1), jnp.inf)
    smallest = jax.lax.cummin(means, axis=1, reverse=True)  # [i, j]: over all ends from j on
    return jnp.where(start <= end, smallest, -jnp.inf).max(axis=0)


def main():
    rng = np.random.default_rng(0)
    curves = jnp.asarray(np.linspace(0, 3, 100) + rng.normal(size=(64, 100)))
    truth = jnp.linspace(0, 3, 100)

    # 1. `register`: the code that calls the kernel stays as it is, and jax.vmap learns what to do with it.
    ffi_call_p = jax.make_jaxpr(isotonic)(curves[0]).eqns[0].primitive
    batchrules.register(ffi_call_p, "broadcast_all", update_params=batchrules.ffi_update_params)
    before = library.CallsMade()
    fits = jax.block_until_ready(jax.jit(jax.vmap(isotonic))(curves))
    print(f"register:    {library.CallsMade() - before} call of the kernel for {len(curves)} curves")
    batchrules.unregister(ffi_call_p)

    # 2. `device_call`: the same, and derivatives.
    def loss(fit, data):
        return jnp.sum((fit(data) - truth) ** 2)

    before = library.CallsMade()
    gradient = jax.jit(jax.vmap(jax.grad(lambda data: loss(isotonic_fit, data))))
    gradients = jax.block_until_ready(gradient(curves))
    print(f"device_call: {library.CallsMade() - before} calls for {len(curves)} gradients (fit, and its vjp)")
    forward, reverse = jax.jacfwd(isotonic_fit)(curves[0]), jax.jacrev(isotonic_fit)(curves[0])

    twin_gradient = jax.jit(jax.vmap(jax.grad(lambda data: loss(twin, data))))
    np.testing.assert_allclose(fits, jax.jit(jax.vmap(twin))(curves), atol=1e-12)
    np.testing.assert_allclose(gradients, twin_gradient(curves), atol=1e-11)
    np.testing.assert_allclose(forward, reverse, atol=1e-14)
    print("Fits and gradients agree with the twin in JAX, and forward mode with reverse mode.")


if __name__ == "__main__":
    main()
