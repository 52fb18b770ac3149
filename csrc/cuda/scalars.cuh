// Hyperparameters that may live on the device.
#pragma once

#include "eigenfilter/contract.hpp"
#include "eigenfilter/rules.hpp"

namespace eigenfilter::cuda {

inline bool on_device(const Scalar& s) { return s.device != nullptr; }
inline bool on_device(const AscendScalars<Scalar>& s) {
    return on_device(s.alpha) || on_device(s.grad_scale);
}
inline bool on_device(const DescendScalars<Scalar>& s) {
    return on_device(s.lr) || on_device(s.momentum) || on_device(s.dampening) ||
           on_device(s.weight_decay) || on_device(s.grad_scale);
}

__host__ __device__ __forceinline__ double value(const Scalar& s) {
#ifdef __CUDA_ARCH__
    if (s.device != nullptr)
        return s.device_is_double ? *static_cast<const double*>(s.device)
                                  : static_cast<double>(*static_cast<const float*>(s.device));
#endif
    return s.value;
}
__host__ __device__ __forceinline__ AscendScalars<double> value(const AscendScalars<Scalar>& s) {
    return {value(s.alpha), value(s.grad_scale)};
}
__host__ __device__ __forceinline__ DescendScalars<double> value(const DescendScalars<Scalar>& s) {
    return {value(s.lr),         value(s.momentum), value(s.dampening), value(s.weight_decay),
            value(s.grad_scale), s.nesterov,        s.maximize};
}

// A rule made on the host, where its coefficients are known there; else by one thread of each
// block: the coefficients take divisions in double, which most GPUs do slowly.
template <class Rule, class Scalars>
class DeferredRule {
 public:
    explicit DeferredRule(const Scalars& s)
        : rule_(value(s)), scalars_(s), deferred_(on_device(s)) {}

    __device__ __forceinline__ Rule get() const {
        if (!deferred_) return rule_;
        __shared__ alignas(Rule) unsigned char room[sizeof(Rule)];
        if (threadIdx.x == 0) *reinterpret_cast<Rule*>(room) = Rule(value(scalars_));
        __syncthreads();
        return *reinterpret_cast<Rule*>(room);
    }

 private:
    Rule rule_;
    Scalars scalars_;
    bool deferred_;
};

}  // namespace eigenfilter::cuda
