// The arithmetic of every update, stated once: the CPU loops call it on SIMD vectors, the CUDA
// kernels on floats. T is the arithmetic's type, float or double; V is T or a vector of T.
// Coefficients are formed in double and rounded once to T; no multiply-add is fused (compiler
// flag).
#pragma once

#include <cmath>

#include "core/ops.hpp"

namespace eigenfilter {

// base^exponent for a whole exponent >= 0, by squaring: the same roundings in every backend.
EIGENFILTER_RULE double power(double base, double exponent) {
    double result = 1;
    for (auto n = static_cast<std::int64_t>(exponent); n > 0; n /= 2) {
        if (n % 2 == 1) result = result * base;
        base = base * base;
    }
    return result;
}

EIGENFILTER_RULE float square_root(float v) { return sqrtf(v); }
EIGENFILTER_RULE double square_root(double v) { return sqrt(v); }

// What every rule has: what it does to x last, given its states before and after as they are stored.
struct Rule {
    template <class V>
    EIGENFILTER_RULE V finish(V x, const V*, const V*) const {
        return x;
    }
};

// x <- from + alpha g / grad_scale; adaptive: x <- from + alpha from^2 g / grad_scale
template <class T>
struct Perturb : Rule {
    T step;
    bool adaptive;

    EIGENFILTER_RULE explicit Perturb(const PerturbScalars<double>& s)
        : step(static_cast<T>(s.alpha * (1 / s.grad_scale))), adaptive(s.adaptive) {}

    template <class V>
    EIGENFILTER_RULE V operator()(V from, V g) const {
        return from + step * (adaptive ? from * from * g : g);
    }
};

// x <- from + alpha h, h = (g - g0) / (eps grad_scale)
template <class T>
struct PerturbHvp : Rule {
    T step;

    EIGENFILTER_RULE explicit PerturbHvp(const PerturbHvpScalars<double>& s)
        : step(static_cast<T>(s.alpha * (1 / s.grad_scale) / s.eps)) {}

    template <class V>
    EIGENFILTER_RULE V operator()(V from, V g, V g0) const {
        return from + step * (g - g0);
    }
};

// d = +-g / grad_scale + wd x;  m <- beta m + (1 - dampening) d;  x <- x - lr m
// (Nesterov: x - lr (d + beta m); without momentum: x - lr d), and last x <- x - e (m - m before)
template <class T>
struct SgdStep : Rule {
    T scale, decay, beta, keep, lr, extrapolation;
    bool nesterov;

    EIGENFILTER_RULE explicit SgdStep(const SgdStepScalars<double>& s)
        : scale(static_cast<T>((s.maximize ? -1 : 1) / s.grad_scale)),
          decay(static_cast<T>(s.weight_decay)),
          beta(static_cast<T>(s.momentum)),
          keep(static_cast<T>(1 - s.dampening)),
          lr(static_cast<T>(s.lr)),
          extrapolation(static_cast<T>(s.extrapolation)),
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

    template <class V>
    EIGENFILTER_RULE V finish(V x, const V* before, const V* m) const {
        return extrapolation == 0 ? x : x - extrapolation * (*m - *before);
    }
};

// d = +-g / grad_scale;  m <- beta1 m + (1 - beta1) d;  v <- beta2 v + (1 - beta2) d^2
// x <- (1 - lr wd) x - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
template <class T>
struct AdamWStep : Rule {
    T scale, beta1, keep1, beta2, keep2, decay, size, root, eps;

    EIGENFILTER_RULE explicit AdamWStep(const AdamWStepScalars<double>& s)
        : scale(static_cast<T>((s.maximize ? -1 : 1) / s.grad_scale)),
          beta1(static_cast<T>(s.beta1)),
          keep1(static_cast<T>(1 - s.beta1)),
          beta2(static_cast<T>(s.beta2)),
          keep2(static_cast<T>(1 - s.beta2)),
          decay(static_cast<T>(1 - s.lr * s.weight_decay)),
          size(static_cast<T>(s.lr / (1 - power(s.beta1, s.step)))),
          root(static_cast<T>(1 / square_root(1 - power(s.beta2, s.step)))),
          eps(static_cast<T>(s.eps)) {}

    template <class V>
    EIGENFILTER_RULE V operator()(V x, V g, V& m, V& v) const {
        const V d = scale * g;
        m = beta1 * m + keep1 * d;
        v = beta2 * v + keep2 * (d * d);
        return decay * x - size * m / (square_root(v) * root + eps);
    }
};

// u <- f_w w + f_q q + f_u u, in double whatever the vectors' type
struct LanczosStep {
    double of_w, of_q, of_u;

    // factors: [3, rows]
    EIGENFILTER_RULE LanczosStep(const double* factors, std::int64_t rows, std::int64_t row)
        : of_w(factors[row]), of_q(factors[rows + row]), of_u(factors[2 * rows + row]) {}

    template <class V>
    EIGENFILTER_RULE V operator()(V w, V q, V u) const {
        return of_w * w + of_q * q + of_u * u;
    }
};

}  // namespace eigenfilter
