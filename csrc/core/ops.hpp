// The operations, each stated once. What the CPU and CUDA offer, the stub of a build without CUDA,
// the CPU's table of loops, and the bindings with their arguments and docstrings follow from here.
#pragma once

#include <cstddef>
#include <utility>

#include "core/tensors.hpp"

namespace eigenfilter {

// What a list of tensors is to a kernel: it writes them; None may stand for them; they are written
// where the flag `save` is set, and only there needed; they are gradients, each of which may have
// the next wider dtype; they are a state of the rule, which it reads and writes; they are one
// tensor and no list.
enum Traits : unsigned {
    kRead = 0,
    kWritten = 1,
    kOptional = 2,
    kSaved = 4,
    kGradients = 8,
    kState = 16 | kWritten,
    kOneTensor = 32,
};

// What a scalar must be; one on a GPU is not looked at. A computed one comes from gradients, and is
// not finite where these are not: if it is a tensor it is not looked at either.
enum class Range {
    any,
    finite,
    computed,
    computed_not_zero,
    positive,
    not_negative,
    fraction,  // at least 0 and less than 1
    count,     // a whole number from 1
    seed,      // a whole number from 0 to 2^24 - 1
};

// What an update does with backups b. None: there are none. Saved: b <- x first, even where
// found_inf is set. Origin: x starts from b. Restored: the same, and x <- b where found_inf is set.
enum class Backup { none, saved, origin, restored };

// An argument of an update in Python: a list of tensors, which is one of those in Tensors, or a
// number or a flag among the scalars.
template <class Scalars, class Real>
struct Argument {
    const char* name;
    void* const* Tensors::* list = nullptr;
    unsigned traits = kRead;
    Real Scalars::* number = nullptr;
    Range range{};
    bool Scalars::* flag = nullptr;

    constexpr Argument(const char* name, void* const* Tensors::* list, unsigned traits)
        : name(name), list(list), traits(traits) {}
    constexpr Argument(const char* name, Real Scalars::* number, Range range)
        : name(name), number(number), range(range) {}
    constexpr Argument(const char* name, bool Scalars::* flag) : name(name), flag(flag) {}
};

// Each update is described by the struct of its scalars, which are doubles for the CPU and Scalars
// for a GPU. kArguments are in Python's order; all calls end with grad_scale, found_inf and
// num_threads. Results of one with a rounding_seed may be rounded stochastically.

template <class>
struct Perturb;
template <class Real>
struct PerturbScalars {
    Real alpha, grad_scale;
    bool adaptive, save;

    template <class T>
    using Rule = Perturb<T>;
    static constexpr Backup kBackup = Backup::origin;
    // clang-format off
    static constexpr Argument<PerturbScalars, Real> kArguments[] = {
        {"params", &Tensors::x, kWritten},
        {"grads", &Tensors::g, kGradients},
        {"backups", &Tensors::b, kSaved},
        {"alpha", &PerturbScalars::alpha, Range::computed},
        {"save", &PerturbScalars::save},
        {"adaptive", &PerturbScalars::adaptive},
    };
    // clang-format on
    static constexpr const char* kDoc =
        R"(Perturb the parameters along their gradients, from their values or from backups.

    save:  b <- x,  x <- x + alpha g / grad_scale
    else:  x <- b + alpha g / grad_scale, without backups x + alpha g / grad_scale

With `adaptive`, g is multiplied by the square of what x starts from. Where found_inf is not zero
x stays, and is still saved.)";
};

template <class>
struct PerturbHvp;
template <class Real>
struct PerturbHvpScalars {
    Real alpha, eps, grad_scale;

    template <class T>
    using Rule = PerturbHvp<T>;
    static constexpr Backup kBackup = Backup::origin;
    static constexpr Argument<PerturbHvpScalars, Real> kArguments[] = {
        {"params", &Tensors::x, kWritten},
        {"grads", &Tensors::g, kGradients},
        {"base_grads", &Tensors::g0, kGradients},
        {"backups", &Tensors::b, kRead},
        {"alpha", &PerturbHvpScalars::alpha, Range::computed},
        {"eps", &PerturbHvpScalars::eps, Range::computed_not_zero},
    };
    static constexpr const char* kDoc =
        R"(Perturb the backups along a Hessian-vector product by finite differences.

    x <- b + alpha (g - g0) / (eps grad_scale)

Where found_inf is not zero x stays.)";
};

template <class>
struct SgdStep;
template <class Real>
struct SgdStepScalars {
    Real lr, momentum, dampening, weight_decay, extrapolation, grad_scale, rounding_seed;
    bool nesterov, maximize;
    bool stochastic;  // whether there is a seed, and results are bf16 or f16

    template <class T>
    using Rule = SgdStep<T>;
    static constexpr Backup kBackup = Backup::restored;
    static constexpr Argument<SgdStepScalars, Real> kArguments[] = {
        {"params", &Tensors::x, kWritten},
        {"grads", &Tensors::g, kGradients},
        {"momenta", &Tensors::m, kState | kOptional},
        {"backups", &Tensors::b, kOptional},
        {"lr", &SgdStepScalars::lr, Range::finite},
        {"momentum", &SgdStepScalars::momentum, Range::finite},
        {"dampening", &SgdStepScalars::dampening, Range::finite},
        {"weight_decay", &SgdStepScalars::weight_decay, Range::finite},
        {"extrapolation", &SgdStepScalars::extrapolation, Range::finite},
        {"nesterov", &SgdStepScalars::nesterov},
        {"maximize", &SgdStepScalars::maximize},
        {"rounding_seed", &SgdStepScalars::rounding_seed, Range::seed},
    };
    static constexpr const char* kDoc =
        R"(Restore the parameters from backups, if there are any, and take a step of SGD.

    d = g / grad_scale + wd x,  m <- momentum m + (1 - dampening) d
    x <- x - lr m               (Nesterov: x - lr (d + momentum m); without momenta: x - lr d)
    x <- x - e (m - m before)   (with an extrapolation e)

Where found_inf is not zero x is restored and m stays.)";
};

template <class>
struct AdamWStep;
template <class Real>
struct AdamWStepScalars {
    Real lr, beta1, beta2, eps, weight_decay, step, grad_scale, rounding_seed;
    bool maximize;
    bool stochastic;  // as in SgdStepScalars

    template <class T>
    using Rule = AdamWStep<T>;
    static constexpr Backup kBackup = Backup::restored;
    static constexpr Argument<AdamWStepScalars, Real> kArguments[] = {
        {"params", &Tensors::x, kWritten},
        {"grads", &Tensors::g, kGradients},
        {"exp_avgs", &Tensors::m, kState},
        {"exp_avg_sqs", &Tensors::v, kState},
        {"backups", &Tensors::b, kOptional},
        {"lr", &AdamWStepScalars::lr, Range::finite},
        {"beta1", &AdamWStepScalars::beta1, Range::fraction},
        {"beta2", &AdamWStepScalars::beta2, Range::fraction},
        {"eps", &AdamWStepScalars::eps, Range::not_negative},
        {"weight_decay", &AdamWStepScalars::weight_decay, Range::finite},
        {"step", &AdamWStepScalars::step, Range::count},
        {"maximize", &AdamWStepScalars::maximize},
        {"rounding_seed", &AdamWStepScalars::rounding_seed, Range::seed},
    };
    static constexpr const char* kDoc =
        R"(Restore the parameters from backups, if there are any, and take a step of AdamW.

    d = g / grad_scale,  m <- beta1 m + (1 - beta1) d,  v <- beta2 v + (1 - beta2) d^2
    x <- (1 - lr wd) x - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)

Where found_inf is not zero x is restored, m and v stay.)";
};

#define EIGENFILTER_UPDATES(UPDATE)        \
    UPDATE(perturb, PerturbScalars)        \
    UPDATE(perturb_hvp, PerturbHvpScalars) \
    UPDATE(sgd_step, SgdStepScalars)       \
    UPDATE(adamw_step, AdamWStepScalars)

template <class Scalars>
constexpr std::size_t kArgumentCount = sizeof Scalars::kArguments / sizeof *Scalars::kArguments;

template <class Scalars, class Holds>
constexpr int count_arguments(Holds holds) {
    int count = 0;
    for (std::size_t i = 0; i < kArgumentCount<Scalars>; ++i)
        count += holds(Scalars::kArguments[i]);
    return count;
}

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
        if (a.traits == kGradients) {
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

// Whether the results of an update may be rounded stochastically.
template <class Scalars>
constexpr bool kMayRound =
    count_arguments<Scalars>([](const auto& a) { return a.range == Range::seed; }) > 0;

// What a call does with its backups.
template <class Scalars>
EIGENFILTER_RULE Backup backup_of(const Tensors& t, const Scalars& s) {
    if (t.b == nullptr) return Backup::none;
    if constexpr (kListsWith<Scalars, kSaved> != 0) {
        if (s.save) return Backup::saved;
    }
    return Scalars::kBackup;
}

// The I-th argument of an update, where it is a number but no seed, or where it is a flag.
template <std::size_t I, template <class> class Scalars, class ValueOf>
EIGENFILTER_RULE void read_number(Scalars<double>& to, const Scalars<Scalar>& from,
                                  const ValueOf& value_of) {
    constexpr auto target = Scalars<double>::kArguments[I];
    constexpr auto source = Scalars<Scalar>::kArguments[I];
    if constexpr (target.number != nullptr && target.range != Range::seed)
        to.*target.number = value_of(from.*source.number);
}
template <std::size_t I, template <class> class Scalars>
EIGENFILTER_RULE void copy_flag(Scalars<double>& to, const Scalars<Scalar>& from) {
    constexpr auto target = Scalars<double>::kArguments[I];
    constexpr auto source = Scalars<Scalar>::kArguments[I];
    if constexpr (target.flag != nullptr) to.*target.flag = from.*source.flag;
}

// Scalars as numbers, each read by value_of.
template <template <class> class Scalars, class ValueOf, std::size_t... I>
EIGENFILTER_RULE Scalars<double> read(const Scalars<Scalar>& from, const ValueOf& value_of,
                                      std::index_sequence<I...>) {
    Scalars<double> to;
    (read_number<I>(to, from, value_of), ...);
    to.grad_scale = value_of(from.grad_scale);
    if constexpr (kMayRound<Scalars<double>>) {
        to.rounding_seed = value_of(from.rounding_seed);
        to.stochastic = from.stochastic;
    }
    (copy_flag<I>(to, from), ...);
    return to;
}
template <template <class> class Scalars, class ValueOf>
EIGENFILTER_RULE Scalars<double> read(const Scalars<Scalar>& from, const ValueOf& value_of) {
    return read(from, value_of, std::make_index_sequence<kArgumentCount<Scalars<double>>>{});
}

// found_inf [1] may be nullptr; where it is not zero an update is not taken.
namespace cpu {
#define DECLARE_UPDATE(name, Scalars) \
    void name(const Tensors&, const Scalars<double>&, const float* found_inf, int threads);
EIGENFILTER_UPDATES(DECLARE_UPDATE)
#undef DECLARE_UPDATE
// Euclidean norm of x, or of g x where g is given, summed in double in an order fixed by the sizes.
double norm(const Tensors&, int threads);
bool has_nonfinite(const Tensors&, int threads);
void orthogonalize(const Orthogonalization&, int threads);
// sums <- (q_i . w_i, w_i . w_i)
void row_dots(const Recurrence&, int threads);
// u_i <- f_0i w_i + f_1i q_i + f_2i u_i,  sums <- (u_i . u_i, u_i . q_i)
void lanczos_step(const Recurrence&, int threads);
// out [rows, rows] <- the vectors' inner products
void gram(const Rows&, double* out, int threads);
// v_i <- sum_{j <= i} factors_ij v_j for factors [rows, rows], all at once
void mix_rows(const Rows&, const double* factors, int threads);
}  // namespace cpu

// The same on a GPU, asynchronously on a stream. found_inf [1], out ([1]; gram's is [rows, rows]),
// factors and the workspace, of so many doubles as the function says that is named after it, are
// device addresses. Without CUDA in the build all but `compiled` throw std::runtime_error.
namespace cuda {
using Stream = void*;
bool compiled();
void require();

#define EIGENFILTER_CUDA_KERNELS(KERNEL)                                                           \
    KERNEL(std::int64_t, norm_workspace, (const Tensors& t))                                       \
    KERNEL(void, norm,                                                                             \
           (const Tensors& t, const Scalar& grad_scale, void* out, bool out_is_double,             \
            double* workspace, int device, Stream stream))                                         \
    KERNEL(void, flag_nonfinite, (const Tensors& t, float* found_inf, int device, Stream stream))  \
    KERNEL(std::int64_t, orthogonalize_workspace,                                                  \
           (std::int64_t rows, std::int64_t columns, std::int64_t count))                          \
    KERNEL(void, orthogonalize,                                                                    \
           (const Orthogonalization& p, double* workspace, int device, Stream stream))             \
    /* for so many sums over all columns */                                                        \
    KERNEL(std::int64_t, sums_workspace, (std::int64_t sums, std::int64_t columns))                \
    KERNEL(void, row_dots, (const Recurrence& r, double* workspace, int device, Stream stream))    \
    KERNEL(void, lanczos_step,                                                                     \
           (const Recurrence& r, double* workspace, int device, Stream stream))                    \
    KERNEL(void, gram, (const Rows& v, double* out, double* workspace, int device, Stream stream)) \
    KERNEL(void, mix_rows, (const Rows& v, const double* factors, int device, Stream stream))

#define DECLARE_UPDATE(name, Scalars)                                                     \
    void name(const Tensors&, const Scalars<Scalar>&, const float* found_inf, int device, \
              Stream stream);
#define DECLARE(Result, name, parameters) Result name parameters;
EIGENFILTER_UPDATES(DECLARE_UPDATE)
EIGENFILTER_CUDA_KERNELS(DECLARE)
#undef DECLARE
#undef DECLARE_UPDATE
}  // namespace cuda

}  // namespace eigenfilter
