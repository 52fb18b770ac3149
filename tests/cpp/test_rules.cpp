// The update rules: vectors give the bits of numbers, and both the exact result within a few ulps.
#include <doctest/doctest.h>

#include <cstddef>
#include <tuple>
#include <type_traits>
#include <vector>

#include "numbers.hpp"

namespace {

using namespace eigenfilter;

// An exact number, and the sum of the sizes of the terms that it is made of: a rounding errs by
// half an ulp of the latter at most.
struct Exact {
    long double value, size;

    Exact(long double number) : value(number), size(std::fabs(number)) {}
    Exact(long double value, long double size) : value(value), size(size) {}

    friend Exact operator+(Exact a, Exact b) { return {a.value + b.value, a.size + b.size}; }
    friend Exact operator-(Exact a, Exact b) { return {a.value - b.value, a.size + b.size}; }
    friend Exact operator*(Exact a, Exact b) { return {a.value * b.value, a.size * b.size}; }
    // For sums of positive terms.
    friend Exact operator/(Exact a, Exact b) { return {a.value / b.value, a.size / b.value}; }
    friend Exact square_root(Exact a) { return {std::sqrt(a.value)}; }
};

// Lists of numbers that a rule reads and writes.
template <class T>
struct Lists {
    static constexpr std::size_t kCount = 4096;
    std::vector<T> x, g, m, v;

    Lists() : x(kCount), g(kCount), m(kCount), v(kCount) {
        std::mt19937 random(11);
        std::uniform_real_distribution<T> exponents(-4, 4);
        for (std::size_t i = 0; i < kCount; ++i) {
            for (auto* list : {&x, &g, &m, &v}) {
                const T size = std::exp2(exponents(random));
                (*list)[i] = list != &v && random() % 2 == 0 ? -size : size;
            }
        }
    }

    // Applies a rule to L elements at a time, or to one.
    template <int L, class Rule>
    void apply(Rule rule) {
        for (std::size_t i = 0; i < kCount; i += L) {
            auto xs = load<Vec<T, L>>(&x[i]), gs = load<Vec<T, L>>(&g[i]);
            auto ms = load<Vec<T, L>>(&m[i]), vs = load<Vec<T, L>>(&v[i]);
            rule(xs, gs, ms, vs);
            store(&x[i], xs);
            store(&m[i], ms);
            store(&v[i], vs);
        }
    }
    template <class Rule>
    void apply_to_numbers(Rule rule) {
        for (std::size_t i = 0; i < kCount; ++i) rule(x[i], g[i], m[i], v[i]);
    }
};

// How many roundings the results of a rule take at most, one after the other.
struct Roundings {
    double x, m = 0, v = 0;
};

template <class T>
bool is_within(T result, const Exact& exact, double roundings) {
    const long double unit = std::numeric_limits<T>::epsilon() / 2;
    return std::fabs(result - exact.value) <= roundings * unit * exact.size;
}

// Checks a rule(x, g, m, v), which overwrites x, m and v, against one over exact numbers.
template <class T, class Rule, class ExactRule>
void check(Rule rule, ExactRule exact_rule, Roundings roundings) {
    const Lists<T> before;
    Lists<T> numbers, vectors;
    numbers.apply_to_numbers(rule);
    vectors.template apply<kRegisterBytes / static_cast<int>(sizeof(T))>(rule);
    Failures bits, errors;
    for (std::size_t i = 0; i < before.kCount; ++i) {
        bits.add_unless(is_same(numbers.x[i], vectors.x[i]) &&
                            is_same(numbers.m[i], vectors.m[i]) &&
                            is_same(numbers.v[i], vectors.v[i]),
                        i);
        Exact x = before.x[i], m = before.m[i], v = before.v[i];
        exact_rule(x, Exact(before.g[i]), m, v);
        errors.add_unless(is_within(numbers.x[i], x, roundings.x) &&
                              is_within(numbers.m[i], m, roundings.m) &&
                              is_within(numbers.v[i], v, roundings.v),
                          i);
    }
    CHECK_NONE(bits);
    CHECK_NONE(errors);
}

std::vector<SgdStepOptions> sgd_options() {
    std::vector<SgdStepOptions> all;
    for (const auto& [momentum, dampening, decay, nesterov, extrapolation] :
         {std::tuple(0.9, 0.0, 0.0, false, 0.0), std::tuple(0.9, 0.3, 0.02, false, 0.0),
          std::tuple(0.6, 0.0, 0.3, true, 0.0), std::tuple(0.0, 0.0, 0.01, false, 0.0),
          std::tuple(0.9, 0.3, 0.02, false, 0.7), std::tuple(0.9, 0.0, 0.0, false, -0.05)}) {
        for (const bool maximize : {false, true}) {
            SgdStepOptions s{};
            s.lr = 0.07;
            s.momentum = momentum;
            s.dampening = dampening;
            s.weight_decay = decay;
            s.extrapolation = extrapolation;
            s.grad_scale = maximize ? 1.0 : 3.0;
            s.nesterov = nesterov;
            s.maximize = maximize;
            all.push_back(s);
        }
    }
    return all;
}

Exact direction(double grad_scale, bool maximize, Exact g) {
    return g * Exact((maximize ? -1.0L : 1.0L) / grad_scale);
}

}  // namespace

TEST_CASE("powers are exact where a double holds them") {
    CHECK(power(2, 10) == 1024);
    CHECK(power(-3, 5) == -243);
    CHECK(power(0.5, 1074) == std::numeric_limits<double>::denorm_min());
    CHECK(power(0.9, 0) == 1);
    CHECK(power(0, 0) == 1);
    CHECK(power(0.9, 1) == 0.9);
    CHECK(power(1, 0x1p53) == 1);
    CHECK(power(0, 3) == 0);
}

TEST_CASE("powers err by half an ulp for each factor at most") {
    for (const double base : {0.99, 0.999, 0.99999, 1.01}) {
        for (const int exponent : {2, 3, 7, 64, 100, 1023, 65'537}) {
            CAPTURE(base);
            CAPTURE(exponent);
            const Exact exact = std::pow(static_cast<long double>(base), exponent);
            CHECK(is_within(power(base, exponent), exact, exponent));
        }
    }
}

TEST_CASE_TEMPLATE("perturb", T, float, double) {
    for (const bool adaptive : {false, true}) {
        PerturbOptions s{};
        s.alpha = -0.3;
        s.grad_scale = 7;
        s.adaptive = adaptive;
        check<T>([rule = Perturb<T>(s)](auto& x, auto g, auto&, auto&) { x = rule(x, g); },
                 [&](Exact& x, Exact g, Exact&, Exact&) {
                     const Exact along = adaptive ? x * x * g : g;
                     x = x + Exact(static_cast<long double>(s.alpha) / s.grad_scale) * along;
                 },
                 {7});
    }
}

TEST_CASE_TEMPLATE("perturb_hvp", T, float, double) {
    PerturbHvpOptions s{};
    s.alpha = 0.3;
    s.eps = 0.013;
    s.grad_scale = 7;
    check<T>([rule = PerturbHvp<T>(s)](auto& x, auto g, auto& m, auto&) { x = rule(x, g, m); },
             [&](Exact& x, Exact g, Exact& m, Exact&) {
                 const long double step = static_cast<long double>(s.alpha) / s.grad_scale / s.eps;
                 x = x + Exact(step) * (g - m);
             },
             {7});
}

TEST_CASE_TEMPLATE("sgd_step", T, float, double) {
    for (const SgdStepOptions& s : sgd_options()) {
        CAPTURE(s.momentum);
        CAPTURE(s.maximize);
        const auto exact = [&](Exact& x, Exact g, Exact& m, bool has_momentum) {
            const Exact d = direction(s.grad_scale, s.maximize, g) + Exact(s.weight_decay) * x;
            const Exact before = m;
            if (has_momentum) m = Exact(s.momentum) * m + Exact(1 - Exact(s.dampening).value) * d;
            const Exact along = !has_momentum ? d : s.nesterov ? d + Exact(s.momentum) * m : m;
            x = x - Exact(s.lr) * along;
            if (s.extrapolation != 0) x = x - Exact(s.extrapolation) * (m - before);
        };
        const SgdStep<T> rule(s);
        check<T>(
            [rule](auto& x, auto g, auto& m, auto&) {
                const auto before = m;
                x = rule(x, g, m);
                x = rule.finish(x, &before, &m);
            },
            [&](Exact& x, Exact g, Exact& m, Exact&) { exact(x, g, m, true); },
            {s.extrapolation != 0 ? 16.0 : 12.0, 6});
        if (s.extrapolation != 0) continue;  // needs momenta
        check<T>([rule](auto& x, auto g, auto&, auto&) { x = rule(x, g); },
                 [&](Exact& x, Exact g, Exact& m, Exact&) { exact(x, g, m, false); }, {6});
    }
}

TEST_CASE_TEMPLATE("without weight decay, momentum does not see the parameters", T, float, double) {
    SgdStepOptions s{};
    s.lr = 0.1;
    s.momentum = 0.5;
    s.grad_scale = 1;
    Vec<T, 2> x = {std::numeric_limits<T>::infinity(), T{1}}, g = {T{2}, T{2}}, m = {T{4}, T{4}};
    x = SgdStep<T>(s)(x, g, m);
    CHECK(m[0] == 4);
    CHECK(m[1] == 4);
    CHECK(std::isinf(x[0]));
}

std::vector<AdamWStepOptions> adamw_options(double beta1, double beta2) {
    std::vector<AdamWStepOptions> all;
    for (const int step : {1, 2, 10, 3000}) {
        for (const bool maximize : {false, true}) {
            for (const double extrapolation : {0.0, 0.05, -0.01}) {
                AdamWStepOptions s{};
                s.lr = 0.02;
                s.beta1 = beta1;
                s.beta2 = beta2;
                s.eps = 1e-3;
                s.weight_decay = 0.3;
                s.extrapolation = extrapolation;
                s.step = step;
                s.grad_scale = maximize ? 1.0 : 3.0;
                s.maximize = maximize;
                all.push_back(s);
            }
        }
    }
    return all;
}

TEST_CASE_TEMPLATE("adamw_step", T, float, double) {
    constexpr bool is_double = std::is_same_v<T, double>;
    for (const AdamWStepOptions& s :
         adamw_options(is_double ? 0.8 : 0.9, is_double ? 0.95 : 0.999)) {
        CAPTURE(s.step);
        CAPTURE(s.maximize);
        CAPTURE(s.extrapolation);
        const long double beta1 = s.beta1, beta2 = s.beta2;
        // In 1 - beta^step the roundings of the power, in double, weigh 1 / (1 - beta) as much.
        const double of_powers = is_double ? 1 / (1 - s.beta1) + 1 / (1 - s.beta2) : 0;
        const auto update = [&](double factor, Exact m, Exact v, double step) {
            const Exact corrected = v * Exact(1 / (1 - std::pow(beta2, step)));
            const long double size = factor / (1 - std::pow(beta1, step));
            return Exact(size) * m / (square_root(corrected) + Exact(s.eps));
        };
        const auto step_by = [](const auto& rule) {
            return [rule](auto& x, auto g, auto& m, auto& v) {
                const decltype(x + m) before[] = {m, v};
                x = rule(x, g, m, v);
                const decltype(x + m) after[] = {m, v};
                x = rule.finish(x, before, after);
            };
        };
        const auto exact = [&](Exact& x, Exact g, Exact& m, Exact& v) {
            const Exact d = direction(s.grad_scale, s.maximize, g);
            const Exact old_m = m, old_v = v;
            m = Exact(beta1) * m + Exact(1 - beta1) * d;
            v = Exact(beta2) * v + Exact(1 - beta2) * (d * d);
            x = Exact(1 - static_cast<long double>(s.lr) * s.weight_decay) * x -
                update(s.lr, m, v, s.step);
            if (s.extrapolation == 0) return;
            Exact change = update(s.extrapolation, m, v, s.step);
            if (s.step > 1) change = change - update(s.extrapolation, old_m, old_v, s.step - 1);
            x = x - change;
        };
        check<T>(step_by(AheadAdamWStep<T>(s)), exact,
                 {(s.extrapolation != 0 ? 17 : 16) + of_powers, 5, 8});
        if (s.extrapolation == 0) check<T>(step_by(AdamWStep<T>(s)), exact, {16 + of_powers, 5, 8});
    }
}

TEST_CASE("lanczos_step") {
    const double factors[] = {9, 0.3, 9, -1.7, 9, 2.1};  // [3, rows], of which this is row 1
    check<double>(
        [rule = LanczosStep(factors, 2, 1)](auto& x, auto g, auto& m, auto&) { x = rule(g, m, x); },
        [](Exact& x, Exact g, Exact& m, Exact&) {
            x = Exact(0.3) * g + Exact(-1.7) * m + Exact(2.1) * x;
        },
        {3});
}
