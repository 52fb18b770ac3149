// SGD's descents on the GPU.
#include "update.cuh"

namespace eigenfilter::cuda {

void sgd_step(const Tensors& lists, const SgdStepScalars<Scalar>& s, const float* found_inf,
              int device, Stream stream) {
    const Tensors t = from_backups(lists);
    by_flag(t.m != nullptr, [&](auto has_m) {
        by_flag(t.b != nullptr, [&](auto has_b) {
            by_flag(s.stochastic, [&](auto seeded) {
                constexpr Backup b = has_b ? Backup::restored : Backup::none;
                update<SgdStep, 1 + has_m, has_m, b, seeded>(t, s, found_inf, device, stream);
            });
        });
    });
}

}  // namespace eigenfilter::cuda
