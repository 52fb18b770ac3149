// The updates, each stated once: what it takes, and its arithmetic. What the CPU and CUDA offer,
// the stub of a build without CUDA, the CPU's table of loops, and the bindings with their arguments
// and docstrings follow from here.
//
// The CPU loops call the arithmetic on SIMD vectors, the CUDA kernels on floats. T is its type,
// float or double; V is T or a vector of T. Coefficients are formed in double and rounded once to
// T; no multiply-add is fused (compiler flag).
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "core/argument.hpp"

namespace eigenfilter {

// What an update does with backups b. None: there are none. Saved: b <- x first, even where
// found_inf is set. Origin: x starts from b. Restored: the same, and x <- b where found_inf is set.
enum class Backup { none, saved, origin, restored };

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
EIGENFILTER_RULE float absolute(float v) { return fabsf(v); }

// An update is described by the struct of its scalars, which are doubles for the CPU and Scalars
// for a GPU. Results of one with a rounding_seed may be rounded stochastically. Its rule is made
// from the scalars as doubles, and takes what the update starts from, then gradients, then states,
// which it changes.

// What every rule has: what it does to x last, given its states before and after as they are
// stored.
struct Rule {
    template <class V>
    EIGENFILTER_RULE V finish(V x, const V*, const V*) const {
        return x;
    }
};

template <class>
struct Perturb;
template <class Real>
struct PerturbScalars {
    Real alpha, grad_scale;
    bool adaptive, save;

    using Call = PerturbScalars;
    template <class T>
    using Rule = Perturb<T>;
    static constexpr Backup kBackup = Backup::origin;
    static constexpr Argument<Call, Real> kArguments[] = {
        {"params", &Tensors::x, kWritten},
        {"grads", &Tensors::g, kMomenta},
        {"backups", &Tensors::b, kSaved},
        {"alpha", &Call::alpha, Range::computed},
        {"corrections", &Tensors::c, kCorrections},
        {"momentum_scales", &Tensors::g_scales, kReadScales},
        {"save", &Call::save, &Tensors::b},
        {"adaptive", &Call::adaptive},
        {"grad_scale", &Call::grad_scale, Range::scale},
        {"found_inf", kOptional},
    };
    static constexpr const char* kDoc =
        R"(Perturb the parameters along their gradients, from their values or from backups.

    save:  b <- x,  x <- x + alpha g / grad_scale
    else:  x <- b + alpha g / grad_scale, without backups x + alpha g / grad_scale

Without backups x may be master weights, and g momenta in any format of a state. With `adaptive`, g
is multiplied by the square of what x starts from. Where found_inf is not zero x stays, and is still
saved.)";
};

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

template <class>
struct PerturbHvp;
template <class Real>
struct PerturbHvpScalars {
    Real alpha, eps, grad_scale;

    using Call = PerturbHvpScalars;
    template <class T>
    using Rule = PerturbHvp<T>;
    static constexpr Backup kBackup = Backup::origin;
    static constexpr Argument<Call, Real> kArguments[] = {
        {"params", &Tensors::x, kWritten},
        {"grads", &Tensors::g, kGradients},
        {"base_grads", &Tensors::g0, kGradients},
        {"backups", &Tensors::b, kRead},
        {"alpha", &Call::alpha, Range::computed},
        {"eps", &Call::eps, Range::computed_not_zero},
        {"grad_scale", &Call::grad_scale, Range::scale},
        {"found_inf", kOptional},
    };
    static constexpr const char* kDoc =
        R"(Perturb the backups along a Hessian-vector product by finite differences.

    x <- b + alpha (g - g0) / (eps grad_scale)

Where found_inf is not zero x stays.)";
};

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

template <class>
struct SgdStep;
template <class Real>
struct SgdStepScalars {
    Real lr, momentum, dampening, weight_decay, extrapolation, step, grad_scale, rounding_seed;
    bool nesterov, maximize;
    bool stochastic;  // whether there is a seed, and results are bf16 or f16

    using Call = SgdStepScalars;
    template <class T>
    using Rule = SgdStep<T>;
    static constexpr Backup kBackup = Backup::restored;
    static constexpr Argument<Call, Real> kArguments[] = {
        {"params", &Tensors::x, kWritten},
        {"grads", &Tensors::g, kGradients},
        {"momenta", &Tensors::m, kState | kOptional},
        {"backups", &Tensors::b, kOptional},
        {"corrections", &Tensors::c, kCorrections},
        {"momentum_scales", &Tensors::m_scales, kScales},
        {"lr", &Call::lr, Range::finite},
        {"momentum", &Call::momentum, Range::finite, &Tensors::m},
        {"dampening", &Call::dampening, Range::finite},
        {"weight_decay", &Call::weight_decay, Range::finite},
        {"extrapolation", &Call::extrapolation, Range::finite, &Tensors::m},
        {"step", &Call::step, Range::count},
        {"nesterov", &Call::nesterov, &Tensors::m},
        {"maximize", &Call::maximize},
        {"rounding_seed", &Call::rounding_seed, Range::seed},
        {"grad_scale", &Call::grad_scale, Range::scale},
        {"found_inf", kOptional},
    };
    static constexpr const char* kDoc =
        R"(Restore the parameters from backups, if there are any, and take a step of SGD.

    d = g / grad_scale + wd x,  m <- momentum m + (1 - dampening) d
    x <- x - lr m               (Nesterov: x - lr (d + momentum m); without momenta: x - lr d)
    x <- x - e (m - m before)   (with an extrapolation e)

Where found_inf is not zero x is restored and m stays.)";
};

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

template <class>
struct AdamWStep;
template <class>
struct AheadAdamWStep;
template <class Real>
struct AdamWStepScalars {
    Real lr, beta1, beta2, eps, weight_decay, extrapolation, step, grad_scale, rounding_seed;
    bool maximize;
    bool stochastic;  // as in SgdStepScalars

    using Call = AdamWStepScalars;
    template <class T>
    using Rule = AdamWStep<T>;
    template <class T>
    using Ahead = AheadAdamWStep<T>;
    static constexpr Backup kBackup = Backup::restored;
    static constexpr Argument<Call, Real> kArguments[] = {
        {"params", &Tensors::x, kWritten},
        {"grads", &Tensors::g, kGradients},
        {"exp_avgs", &Tensors::m, kState},
        {"exp_avg_sqs", &Tensors::v, kState | kUnsigned},
        {"backups", &Tensors::b, kOptional},
        {"corrections", &Tensors::c, kCorrections},
        {"exp_avg_scales", &Tensors::m_scales, kScales},
        {"exp_avg_sq_scales", &Tensors::v_scales, kScales},
        {"lr", &Call::lr, Range::finite},
        {"beta1", &Call::beta1, Range::fraction},
        {"beta2", &Call::beta2, Range::fraction},
        {"eps", &Call::eps, Range::not_negative},
        {"weight_decay", &Call::weight_decay, Range::finite},
        {"extrapolation", &Call::extrapolation, Range::finite},
        {"step", &Call::step, Range::count},
        {"maximize", &Call::maximize},
        {"rounding_seed", &Call::rounding_seed, Range::seed},
        {"grad_scale", &Call::grad_scale, Range::scale},
        {"found_inf", kOptional},
    };
    static constexpr const char* kDoc =
        R"(Restore the parameters from backups, if there are any, and take a step of AdamW.

    d = g / grad_scale,  m <- beta1 m + (1 - beta1) d,  v <- beta2 v + (1 - beta2) d^2
    u = m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)
    x <- (1 - lr wd) x - lr u   (with an extrapolation e: - lr u - e (u - u before), where u is that
                                of m and v as they are stored, and 0 before step 1)

Where found_inf is not zero x is restored, m and v stay.)";
};

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
    EIGENFILTER_RULE void update_moments(V g, V& m, V& v) const {
        const V d = scale * g;
        m = beta1 * m + keep1 * d;
        v = beta2 * v + keep2 * (d * d);
    }

    template <class V>
    EIGENFILTER_RULE V operator()(V x, V g, V& m, V& v) const {
        update_moments(g, m, v);
        return decay * x - size * m / (square_root(v) * root + eps);
    }
};

// With an extrapolation e: x <- (1 - lr wd) x - ((lr + e) u - e (u before)).
template <class T>
struct AheadAdamWStep : AdamWStep<T> {
    using Straight = AdamWStep<T>;
    bool is_straight;  // an e on the device may be 0
    // Factors of m in (lr + e) u and in e (u before), and that of the root of v before.
    T ahead, back = 0, root_before = 0;

    EIGENFILTER_RULE explicit AheadAdamWStep(const AdamWStepScalars<double>& s)
        : Straight(s),
          is_straight(s.extrapolation == 0),
          ahead(static_cast<T>((s.lr + s.extrapolation) / (1 - power(s.beta1, s.step)))) {
        if (s.step == 1) return;
        back = static_cast<T>(s.extrapolation / (1 - power(s.beta1, s.step - 1)));
        root_before = static_cast<T>(1 / square_root(1 - power(s.beta2, s.step - 1)));
    }

    template <class V>
    EIGENFILTER_RULE V operator()(V x, V g, V& m, V& v) const {
        if (is_straight) return Straight::operator()(x, g, m, v);
        this->update_moments(g, m, v);
        return this->decay * x;
    }

    template <class V>
    EIGENFILTER_RULE V finish(V x, const V* before, const V* after) const {
        if (is_straight) return x;
        V change = ahead * after[0] / (square_root(after[1]) * this->root + this->eps);
        if (back != 0)
            change = change - back * before[0] / (square_root(before[1]) * root_before + this->eps);
        return x - change;
    }
};

#define EIGENFILTER_UPDATES(UPDATE)        \
    UPDATE(perturb, PerturbScalars)        \
    UPDATE(perturb_hvp, PerturbHvpScalars) \
    UPDATE(sgd_step, SgdStepScalars)       \
    UPDATE(adamw_step, AdamWStepScalars)

// How many lists of an update have some traits.
template <class Scalars, unsigned Wanted>
constexpr int kListsWith = count_arguments<Scalars>(
    [](const auto& a) { return a.list != nullptr && (a.traits & Wanted) == Wanted; });

// Whether a list of Tensors may be absent in an update that has it otherwise.
template <class Scalars, void* const* Tensors::* List>
constexpr bool kMayBeAbsent = count_arguments<Scalars>([](const auto& a) {
                                  return a.list == List && (a.traits & (kOptional | kSaved)) != 0;
                              }) > 0;

// Whether an update has its lists as the loops and the kernels read them: x first, which is
// written; gradients g, then g0, never absent; states m, then v, present or absent together;
// backups b.
template <class Scalars>
constexpr bool kIsWellFormed = [] {
    constexpr void* const* Tensors::* gradients[] = {&Tensors::g, &Tensors::g0, nullptr};
    constexpr void* const* Tensors::* states[] = {&Tensors::m, &Tensors::v, nullptr};
    int grads = 0, kept = 0, optional = 0;
    bool holds =
        Scalars::kArguments[0].list == &Tensors::x && Scalars::kArguments[0].traits == kWritten;
    for (std::size_t i = 1; i < kArgumentCount<Scalars>; ++i) {
        const auto& a = Scalars::kArguments[i];
        if (a.list == nullptr || a.list == &Tensors::b) continue;
        if (a.traits == kCorrections || (a.traits & kReadScales) == kReadScales) continue;
        if ((a.traits & kGradients) != 0) {
            holds &= a.list == gradients[grads];
            grads += grads < 2;
        } else {
            holds &= (a.traits & kState) == kState && a.list == states[kept];
            kept += kept < 2;
            optional += (a.traits & kOptional) != 0;
        }
    }
    return holds && grads > 0 && (optional == 0 || optional == kept);
}();
#define CHECK_UPDATE(name, Scalars) \
    static_assert(kIsWellFormed<Scalars<double>>, #name " has lists in another order");
EIGENFILTER_UPDATES(CHECK_UPDATE)
#undef CHECK_UPDATE

// Whether an update takes compressed tensors.
template <class Scalars>
constexpr bool kMayBeCompressed =
    count_arguments<Scalars>([](const auto& a) { return a.traits == kCorrections; }) > 0;

// Whether the results of an update may be rounded stochastically.
template <class Scalars>
constexpr bool kMayRound =
    count_arguments<Scalars>([](const auto& a) { return a.range == Range::seed; }) > 0;

// Whether an update has a rule, `Ahead`, for calls with an extrapolation. It is another one where
// kernels without an extrapolation would lack the registers that it takes.
template <class Scalars, class = void>
constexpr bool kHasAhead = false;
template <class Scalars>
constexpr bool kHasAhead<Scalars, std::void_t<typename Scalars::template Ahead<float>>> = true;

// What a call does with its backups.
template <class Scalars>
EIGENFILTER_RULE Backup backup_of(const Tensors& t, const Scalars& s) {
    if (t.b == nullptr) return Backup::none;
    if constexpr (kListsWith<Scalars, kSaved> != 0) {
        if (s.save) return Backup::saved;
    }
    return Scalars::kBackup;
}

// The I-th argument of an update, where it is a number, read by value_of, or a flag.
template <std::size_t I, template <class> class Scalars, class ValueOf>
EIGENFILTER_RULE void read_argument(Scalars<double>& to, const Scalars<Scalar>& from,
                                    const ValueOf& value_of) {
    constexpr auto target = Scalars<double>::kArguments[I];
    constexpr auto source = Scalars<Scalar>::kArguments[I];
    if constexpr (target.number != nullptr) to.*target.number = value_of(from.*source.number);
    if constexpr (target.flag != nullptr) to.*target.flag = from.*source.flag;
}

// Scalars as numbers.
template <template <class> class Scalars, class ValueOf, std::size_t... I>
EIGENFILTER_RULE Scalars<double> read(const Scalars<Scalar>& from, const ValueOf& value_of,
                                      std::index_sequence<I...>) {
    Scalars<double> to;
    (read_argument<I>(to, from, value_of), ...);
    if constexpr (kMayRound<Scalars<double>>) to.stochastic = from.stochastic;
    return to;
}
template <template <class> class Scalars, class ValueOf>
EIGENFILTER_RULE Scalars<double> read(const Scalars<Scalar>& from, const ValueOf& value_of) {
    return read(from, value_of, std::make_index_sequence<kArgumentCount<Scalars<double>>>{});
}

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
