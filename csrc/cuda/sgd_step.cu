// SGD's descents on the GPU.
#include "update.cuh"

namespace eigenfilter::cuda {

EIGENFILTER_CUDA_UPDATE(sgd_step, SgdStepScalars)

}  // namespace eigenfilter::cuda
