// Hyperparameters that may live on the device.
#pragma once

#include "eigenfilter/contract.hpp"
#include "eigenfilter/rules.hpp"

namespace eigenfilter::cuda {

template <class... Scalars>
bool any_on_device(const Scalars&... s) {
    return ((s.device != nullptr) || ...);
}
inline bool on_device(const PerturbScalars<Scalar>& s) {
    return any_on_device(s.alpha, s.grad_scale);
}
inline bool on_device(const HvpScalars<Scalar>& s) {
    return any_on_device(s.alpha, s.eps, s.grad_scale);
}
inline bool on_device(const SgdScalars<Scalar>& s) {
    return any_on_device(s.lr, s.momentum, s.dampening, s.weight_decay, s.grad_scale,
                         s.rounding_seed);
}
inline bool on_device(const AdamWScalars<Scalar>& s) {
    return any_on_device(s.lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.step, s.grad_scale,
                         s.rounding_seed);
}

__host__ __device__ __forceinline__ double value(const Scalar& s) {
#ifdef __CUDA_ARCH__
    if (s.device != nullptr)
        return s.device_is_double ? *static_cast<const double*>(s.device)
                                  : static_cast<double>(*static_cast<const float*>(s.device));
#endif
    return s.value;
}
__host__ __device__ __forceinline__ PerturbScalars<double> value(const PerturbScalars<Scalar>& s) {
    return {value(s.alpha), value(s.grad_scale), s.adaptive, s.save};
}
__host__ __device__ __forceinline__ HvpScalars<double> value(const HvpScalars<Scalar>& s) {
    return {value(s.alpha), value(s.eps), value(s.grad_scale)};
}
__host__ __device__ __forceinline__ SgdScalars<double> value(const SgdScalars<Scalar>& s) {
    return {value(s.lr),         value(s.momentum),      value(s.dampening), value(s.weight_decay),
            value(s.grad_scale), value(s.rounding_seed), s.nesterov,         s.maximize,
            s.stochastic};
}
__host__ __device__ __forceinline__ AdamWScalars<double> value(const AdamWScalars<Scalar>& s) {
    return {value(s.lr),         value(s.beta1),         value(s.beta2),
            value(s.eps),        value(s.weight_decay),  value(s.step),
            value(s.grad_scale), value(s.rounding_seed), s.maximize,
            s.stochastic};
}

// A rule made on the host, where its coefficients are known there; else by one thread of each
// block: the coefficients take divisions in double, which most GPUs do slowly.
template <class Rule, class Scalars>
class DeferredRule {
 public:
    explicit DeferredRule(const Scalars& s)
        : rule_(value(s)), scalars_(s), deferred_(on_device(s)) {}

    __device__ __forceinline__ Rule get() const {
        if (!deferred_) return rule_;  // not needed for the result: one for the launch is faster
        __shared__ alignas(Rule) unsigned char bytes[sizeof(Rule)];
        if (threadIdx.x == 0) *reinterpret_cast<Rule*>(bytes) = Rule(value(scalars_));
        __syncthreads();
        return *reinterpret_cast<Rule*>(bytes);
    }

 private:
    Rule rule_;
    Scalars scalars_;
    bool deferred_;
};

}  // namespace eigenfilter::cuda
