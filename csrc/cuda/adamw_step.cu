// AdamW's descents on the GPU.
#include "update.cuh"

namespace eigenfilter::cuda {

EIGENFILTER_CUDA_UPDATE(adamw_step, AdamWStepScalars)

}  // namespace eigenfilter::cuda
