// The CUDA entry points of a build without CUDA: each says why it cannot run and what to do.
#include <stdexcept>

#include "core/ops.hpp"

#pragma GCC diagnostic ignored "-Wunused-parameter"

namespace eigenfilter::cuda {

bool compiled() { return false; }

void require() {
    throw std::runtime_error(
        "eigenfilter was built without its CUDA kernels: reinstall it where nvcc is on the PATH "
        "(pip install --no-binary eigenfilter -C cmake.define.EIGENFILTER_CUDA=ON eigenfilter), or "
        "use backend=\"triton\"");
}

#define STUB(Result, name, parameters) \
    Result name parameters {           \
        require();                     \
        return Result();               \
    }
#define STUB_UPDATE(name, Scalars)                                                        \
    STUB(void, name,                                                                      \
         (const Tensors& t, const Scalars<Scalar>& s, const float* found_inf, int device, \
          Stream stream))
EIGENFILTER_UPDATES(STUB_UPDATE)
EIGENFILTER_CUDA_KERNELS(STUB)

}  // namespace eigenfilter::cuda
