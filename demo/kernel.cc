// A tridiagonal solver as an XLA FFI kernel (CPU, float64): the Thomas algorithm.
//
// Operands: lower, diagonal, upper, right-hand side, each (n) or (lead..., n), where the leading dimensions come to
// the size of the batch or to 1. An operand that leads with 1 is shared by the batch and never copied.
// Result: the solution, (lead..., n). lower[0] and upper[n - 1] are not used.

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

using Operand = ffi::Buffer<ffi::F64>;
using Result = ffi::ResultBuffer<ffi::F64>;

namespace {

std::atomic<int64_t> calls{0};

struct Rows {
  const double* data;
  size_t stride;  // 0 where one row serves the whole batch
  const double* row(size_t element) const { return data + element * stride; }
};

// No pivoting: the matrix must be diagonally dominant, or symmetric and positive definite.
void SolveOne(size_t n, const double* lower, const double* diagonal, const double* upper, const double* rhs,
              double* swept, double* x) {
  double pivot = diagonal[0];
  x[0] = rhs[0] / pivot;
  for (size_t i = 1; i < n; ++i) {
    swept[i] = upper[i - 1] / pivot;
    pivot = diagonal[i] - lower[i] * swept[i];
    x[i] = (rhs[i] - lower[i] * x[i - 1]) / pivot;
  }
  for (size_t i = n - 1; i > 0; --i) x[i - 1] -= swept[i] * x[i];
}

bool Bind(const Operand& operand, size_t n, size_t batch, Rows& rows) {
  const auto dimensions = operand.dimensions();
  if (dimensions.size() == 0 || static_cast<size_t>(dimensions.back()) != n) return false;
  const size_t lead = operand.element_count() / n;
  if (lead != 1 && lead != batch) return false;
  rows = {operand.typed_data(), lead == 1 ? 0 : n};
  return true;
}

ffi::Error Tridiagonal(Operand lower, Operand diagonal, Operand upper, Operand rhs, Result x) {
  ++calls;
  if (x->element_count() == 0) return ffi::Error::Success();
  const size_t n = static_cast<size_t>(x->dimensions().back());
  const size_t batch = x->element_count() / n;
  const Operand* operands[] = {&lower, &diagonal, &upper, &rhs};
  Rows rows[4];
  for (int i = 0; i < 4; ++i) {
    if (!Bind(*operands[i], n, batch, rows[i])) {
      return ffi::Error::InvalidArgument("operand " + std::to_string(i) + " must lead with 1 or with the batch and end with n");
    }
  }
  std::vector<double> swept(n);
  for (size_t e = 0; e < batch; ++e) {
    SolveOne(n, rows[0].row(e), rows[1].row(e), rows[2].row(e), rows[3].row(e), swept.data(),
             x->typed_data() + e * n);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(TridiagonalHandler, Tridiagonal,
                              ffi::Ffi::Bind().Arg<Operand>().Arg<Operand>().Arg<Operand>().Arg<Operand>().Ret<Operand>());

// So that the demo can tell how often XLA really called.
extern "C" int64_t CallsMade() { return calls.load(); }
