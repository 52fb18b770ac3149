// The arithmetic of every update, stated once: the CPU loops call it on SIMD vectors, the CUDA
// kernels on floats. T is the arithmetic's type, float or double; V is T or a vector of T.
// Coefficients are formed in double and rounded once to T; no multiply-add is fused (compiler
// flag).
#pragma once

#include "eigenfilter/contract.hpp"

#ifdef __CUDACC__
#define EIGENFILTER_RULE __host__ __device__ __forceinline__
#else
#define EIGENFILTER_RULE inline __attribute__((always_inline))
#endif

namespace eigenfilter {

// x <- x + alpha g / grad_scale
template <class T>
struct Ascend {
    T step;

    EIGENFILTER_RULE explicit Ascend(const AscendScalars<double>& s)
        : step(static_cast<T>(s.alpha * (1 / s.grad_scale))) {}

    template <class V>
    EIGENFILTER_RULE V operator()(V x, V g) const {
        return x + step * g;
    }
};

// d = +-g / grad_scale + wd x;  m <- beta m + (1 - dampening) d;  x <- x - lr m
// (Nesterov: x - lr (d + beta m); without momentum: x - lr d)
template <class T>
struct Descend {
    T scale, decay, beta, keep, lr;
    bool nesterov;

    EIGENFILTER_RULE explicit Descend(const DescendScalars<double>& s)
        : scale(static_cast<T>((s.maximize ? -1 : 1) / s.grad_scale)),
          decay(static_cast<T>(s.weight_decay)),
          beta(static_cast<T>(s.momentum)),
          keep(static_cast<T>(1 - s.dampening)),
          lr(static_cast<T>(s.lr)),
          nesterov(s.nesterov) {}

    template <class V>
    EIGENFILTER_RULE V direction(V x, V g) const {
        V d = scale * g;
        return decay == 0 ? d : d + decay * x;
    }

    template <class V>
    EIGENFILTER_RULE V operator()(V x, V g) const {
        return x - lr * direction(x, g);
    }

    template <class V>
    EIGENFILTER_RULE V operator()(V x, V g, V& m) const {
        const V d = direction(x, g);
        m = beta * m + keep * d;
        return x - lr * (nesterov ? d + beta * m : m);
    }
};

}  // namespace eigenfilter
