// Hyperparameters that may live on the device.
#pragma once

#include "core/rules.hpp"

namespace eigenfilter::cuda {

__device__ __forceinline__ bool is_set(const float* flag) { return flag != nullptr && *flag != 0; }

// Reads a scalar, on the device wherever it lies, on the host if it lies there.
struct ValueOf {
    __host__ __device__ __forceinline__ double operator()(const Scalar& s) const {
#ifdef __CUDA_ARCH__
        if (s.device != nullptr)
            return s.device_is_double ? *static_cast<const double*>(s.device)
                                      : static_cast<double>(*static_cast<const float*>(s.device));
#endif
        return s.value;
    }
};

template <class Scalars>
bool any_on_device(const Scalars& s) {
    bool any = s.grad_scale.device != nullptr;
    for (const auto& a : Scalars::kArguments)
        // To defer always is right too: the place is not needed for the result, but for speed.
        any |= a.number != nullptr && (s.*a.number).device != nullptr;
    return any;
}

// A rule made on the host, where its coefficients are known there; else by one thread of each
// block: the coefficients take divisions in double, which most GPUs do slowly.
template <class Rule, class Scalars>
class DeferredRule {
 public:
    explicit DeferredRule(const Scalars& s)
        : rule_(read(s, ValueOf{})), scalars_(s), deferred_(any_on_device(s)) {}

    __device__ __forceinline__ Rule get() const {
        if (!deferred_) return rule_;  // not needed for the result: one for the launch is faster
        __shared__ alignas(Rule) unsigned char bytes[sizeof(Rule)];
        if (threadIdx.x == 0) *reinterpret_cast<Rule*>(bytes) = Rule(read(scalars_, ValueOf{}));
        __syncthreads();
        return *reinterpret_cast<Rule*>(bytes);
    }

 private:
    Rule rule_;
    Scalars scalars_;
    bool deferred_;
};

}  // namespace eigenfilter::cuda
