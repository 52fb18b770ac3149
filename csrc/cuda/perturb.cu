// Ascents on the GPU, and whether there are CUDA kernels at all.
#include "update.cuh"

namespace eigenfilter::cuda {

bool compiled() { return true; }

void require() {}

void perturb(const Tensors& lists, const PerturbScalars<Scalar>& s, const float* found_inf,
             int device, Stream stream) {
    if (s.save) {
        update<Perturb, 1, 0, Backup::saved>(lists, s, found_inf, device, stream);
        return;
    }
    const Tensors t = from_backups(lists);
    by_flag(t.b != nullptr, [&](auto has_b) {
        constexpr Backup b = has_b ? Backup::origin : Backup::none;
        update<Perturb, 1, 0, b>(t, s, found_inf, device, stream);
    });
}

void perturb_hvp(const Tensors& t, const PerturbHvpScalars<Scalar>& s, const float* found_inf,
                 int device, Stream stream) {
    update<PerturbHvp, 2, 0, Backup::origin>(t, s, found_inf, device, stream);
}

}  // namespace eigenfilter::cuda
