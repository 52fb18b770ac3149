// Ascents on the GPU, and whether there are CUDA kernels at all.
#include "update.cuh"

namespace eigenfilter::cuda {

bool compiled() { return true; }

void require() {}

EIGENFILTER_CUDA_UPDATE(perturb, PerturbScalars)
EIGENFILTER_CUDA_UPDATE(perturb_hvp, PerturbHvpScalars)

}  // namespace eigenfilter::cuda
