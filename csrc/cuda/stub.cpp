// The CUDA entry points of a build without CUDA: each says why it cannot run and what to do.
#include <stdexcept>

#include "eigenfilter/contract.hpp"

namespace eigenfilter::cuda {

bool compiled() { return false; }

void require() {
    throw std::runtime_error(
        "eigenfilter was built without its CUDA kernels: reinstall it where nvcc is on the PATH "
        "(pip install --no-binary eigenfilter -C cmake.define.EIGENFILTER_CUDA=ON eigenfilter), or "
        "use backend=\"triton\"");
}

void perturb(const Tensors&, const PerturbScalars<Scalar>&, const float*, int, Stream) {
    require();
}
void perturb_hvp(const Tensors&, const HvpScalars<Scalar>&, const float*, int, Stream) {
    require();
}
void sgd_step(const Tensors&, const SgdScalars<Scalar>&, const float*, int, Stream) { require(); }
void adamw_step(const Tensors&, const AdamWScalars<Scalar>&, const float*, int, Stream) {
    require();
}
std::int64_t norm_workspace(const Tensors&) {
    require();
    return 0;
}
void norm(const Tensors&, const Scalar&, void*, bool, double*, int, Stream) { require(); }
void flag_nonfinite(const Tensors&, float*, int, Stream) { require(); }
std::int64_t orthogonalize_workspace(std::int64_t, std::int64_t, std::int64_t) {
    require();
    return 0;
}
void orthogonalize(const Projection&, double*, int, Stream) { require(); }
std::int64_t sums_workspace(std::int64_t, std::int64_t) {
    require();
    return 0;
}
void row_dots(const Recurrence&, double*, int, Stream) { require(); }
void lanczos_step(const Recurrence&, double*, int, Stream) { require(); }
void gram(const Rows&, double*, double*, int, Stream) { require(); }
void mix_rows(const Rows&, const double*, int, Stream) { require(); }

}  // namespace eigenfilter::cuda
