// Ascents on the GPU, and whether there are CUDA kernels at all.
#include "update.cuh"

namespace eigenfilter::cuda {

bool compiled() { return true; }

void require() {}

void ascend(const Tensors& t, const AscendScalars<Scalar>& s, const float* found_inf, int device,
            Stream stream) {
    update<Ascend, 1, 0, Backup::kept>(t, s, found_inf, device, stream);
}

void ascend_again(const Tensors& given, const AscendScalars<Scalar>& s, const float* found_inf,
                  int device, Stream stream) {
    const Tensors t = from_backups(given);
    by_flag(t.b != nullptr, [&](auto has_b) {
        constexpr Backup b = has_b ? Backup::origin : Backup::none;
        update<Ascend, 1, 0, b>(t, s, found_inf, device, stream);
    });
}

void ascend_hvp(const Tensors& t, const HvpScalars<Scalar>& s, const float* found_inf, int device,
                Stream stream) {
    update<AscendHvp, 2, 0, Backup::origin>(t, s, found_inf, device, stream);
}

}  // namespace eigenfilter::cuda
