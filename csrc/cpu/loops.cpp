// The inner loops, compiled once for each instruction set (EIGENFILTER_ISA names it).
#include "loops.hpp"

#include "orthogonalize_loops.hpp"
#include "simd.hpp"
// Their templates see the functions of vectors, declared before.
#include "eigenfilter/rounding.hpp"
#include "eigenfilter/rules.hpp"
#include "lanczos_loops.hpp"

namespace eigenfilter::cpu {
namespace {

template <class Storage>
constexpr int kLanes = kRegisterBytes / static_cast<int>(sizeof(typename Storage::Arithmetic));

// Calls body(io, i) for blocks from element i on that cover n elements; with `streamed`, whole
// blocks start where that pointer is aligned, and what is only written goes past the caches.
template <class Storage, class Body>
EIGENFILTER_INLINE void walk(std::int64_t n, const typename Storage::Bits* streamed, Body body) {
    constexpr int L = kLanes<Storage>;
    std::int64_t i = 0;
    if (streamed != nullptr) {
        constexpr std::uintptr_t block = L * sizeof(typename Storage::Bits);
        const auto past = reinterpret_cast<std::uintptr_t>(streamed) % block;
        if (past != 0) {
            const auto head = static_cast<std::int64_t>((block - past) / sizeof(*streamed));
            i = head < n ? head : n;
            body(Partial<Storage, L>{i}, 0);
        }
        for (; i + L <= n; i += L) body(Streamed<Storage, L>{}, i);
        end_of_streaming();
    } else {
        for (; i + L <= n; i += L) body(Whole<Storage, L>{}, i);
    }
    if (i < n) body(Partial<Storage, L>{n - i}, i);
}

template <class Storage, class Gradient>
void perturb(const PerturbScalars<double>& s, typename Storage::Bits* x,
             const typename Storage::Bits* from, const typename Gradient::Bits* g,
             typename Storage::Bits* b, std::int64_t n, bool stream) {
    constexpr int L = kLanes<Storage>;
    const Perturb<typename Storage::Arithmetic> rule(s);
    const auto perturbed = [=](auto origin, auto gradient) {
        return Storage::template narrow<L>(
            rule(Storage::template widen<L>(origin), Gradient::template widen<L>(gradient)));
    };
    if (b != nullptr) {
        walk<Storage>(n, stream ? b : nullptr, [=](auto io, std::int64_t i) {
            const auto origin = io.read(from + i), gradient = io.read(g + i);
            io.write_only(b + i, origin);
            io.write(x + i, perturbed(origin, gradient));
        });
    } else {
        walk<Storage>(n, stream && from != x ? x : nullptr, [=](auto io, std::int64_t i) {
            io.write_only(x + i, perturbed(io.read(from + i), io.read(g + i)));
        });
    }
}

template <class Storage, class Gradient>
void perturb_hvp(const HvpScalars<double>& s, typename Storage::Bits* x,
                 const typename Gradient::Bits* g, const typename Gradient::Bits* g0,
                 const typename Storage::Bits* b, std::int64_t n, bool stream) {
    constexpr int L = kLanes<Storage>;
    const PerturbHvp<typename Storage::Arithmetic> rule(s);
    walk<Storage>(n, stream ? x : nullptr, [=](auto io, std::int64_t i) {
        const auto origin = Storage::template widen<L>(io.read(b + i));
        const auto gradient = Gradient::template widen<L>(io.read(g + i));
        const auto before = Gradient::template widen<L>(io.read(g0 + i));
        io.write_only(x + i, Storage::template narrow<L>(rule(origin, gradient, before)));
    });
}

// Rounds and narrows the results of a block from element i on.
template <class Storage, class Rounding, class V>
EIGENFILTER_INLINE auto rounded(const Rounding& rounding, V v, Output output, std::int64_t i) {
    constexpr int L = kLanes<Storage>;
    constexpr std::uint32_t lanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const auto index = load<Vec<std::uint32_t, L>>(lanes) + static_cast<std::uint32_t>(i);
    return Storage::template narrow<L>(rounding.template round<Storage>(v, output, index));
}

template <class Storage, class Gradient, class Rounding>
void sgd_step(const SgdScalars<double>& s, typename Storage::Bits* x,
              const typename Gradient::Bits* g, typename Storage::Bits* m,
              const typename Storage::Bits* b, std::int64_t n, bool stream,
              const Rounding& rounding) {
    constexpr int L = kLanes<Storage>;
    const SgdStep<typename Storage::Arithmetic> rule(s);
    const auto* from = b != nullptr ? b : x;
    const auto* streamed = stream && b != nullptr ? x : nullptr;
    if (m == nullptr) {
        walk<Storage>(n, streamed, [=](auto io, std::int64_t i) {
            const auto origin = Storage::template widen<L>(io.read(from + i));
            const auto gradient = Gradient::template widen<L>(io.read(g + i));
            const auto updated = rule(origin, gradient);
            io.write_only(x + i, rounded<Storage>(rounding, updated, Output::x, i));
        });
    } else {
        walk<Storage>(n, streamed, [=](auto io, std::int64_t i) {
            const auto origin = Storage::template widen<L>(io.read(from + i));
            const auto gradient = Gradient::template widen<L>(io.read(g + i));
            auto momentum = Storage::template widen<L>(io.read(m + i));
            const auto updated = rule(origin, gradient, momentum);
            io.write(m + i, rounded<Storage>(rounding, momentum, Output::m, i));
            io.write_only(x + i, rounded<Storage>(rounding, updated, Output::x, i));
        });
    }
}

template <class Storage, class Gradient, class Rounding>
void adamw_step(const AdamWScalars<double>& s, typename Storage::Bits* x,
                const typename Gradient::Bits* g, typename Storage::Bits* m,
                typename Storage::Bits* v, const typename Storage::Bits* b, std::int64_t n,
                bool stream, const Rounding& rounding) {
    constexpr int L = kLanes<Storage>;
    const AdamWStep<typename Storage::Arithmetic> rule(s);
    const auto* from = b != nullptr ? b : x;
    walk<Storage>(n, stream && b != nullptr ? x : nullptr, [=](auto io, std::int64_t i) {
        const auto origin = Storage::template widen<L>(io.read(from + i));
        const auto gradient = Gradient::template widen<L>(io.read(g + i));
        auto first = Storage::template widen<L>(io.read(m + i));
        auto second = Storage::template widen<L>(io.read(v + i));
        const auto updated = rule(origin, gradient, first, second);
        io.write(m + i, rounded<Storage>(rounding, first, Output::m, i));
        io.write(v + i, rounded<Storage>(rounding, second, Output::v, i));
        io.write_only(x + i, rounded<Storage>(rounding, updated, Output::x, i));
    });
}

template <class Gradient, class Storage>
double sum_squares(const typename Gradient::Bits* t, const typename Storage::Bits* weights,
                   std::int64_t n) {
    Sums sums = {};
    by_parts<Gradient>(n, [&](auto io, std::int64_t i, int part) {
        auto value = to_doubles(Gradient::template widen<kDoubles>(io.read(t + i)));
        if (weights != nullptr)
            value *= to_doubles(Storage::template widen<kDoubles>(io.read(weights + i)));
        sums[part] += value * value;
    });
    return sum_of(sums);
}

// x - x is NaN for inf and NaN, 0 for every other x.
template <class Storage>
bool has_nonfinite(const typename Storage::Bits* t, std::int64_t n) {
    constexpr int L = kLanes<Storage>;
    Vec<typename Storage::Arithmetic, L> traces{};
    walk<Storage>(n, nullptr, [&](auto io, std::int64_t i) {
        const auto value = Storage::template widen<L>(io.read(t + i));
        traces += value - value;
    });
    for (int lane = 0; lane < L; ++lane) {
        if (traces[lane] != traces[lane]) return true;
    }
    return false;
}

template <class Call>
EIGENFILTER_INLINE auto by_narrow_dtype(DType dtype, Call call) {
    return dtype == DType::bf16 ? call(BFloat16{}) : call(Float16{});
}

template <class Call>
EIGENFILTER_INLINE auto by_dtype(DType dtype, Call call) {
    if (dtype == DType::f32) return call(Native<float>{});
    if (dtype == DType::f64) return call(Native<double>{});
    return by_narrow_dtype(dtype, call);
}

// Calls call(storage, gradient storage); both are of one arithmetic.
template <class Call>
EIGENFILTER_INLINE auto by_narrow_dtypes(DTypes t, Call call) {
    return by_narrow_dtype(t.param, [&](auto storage) {
        return t.grad == t.param ? call(storage, storage) : call(storage, Native<float>{});
    });
}

template <class Call>
EIGENFILTER_INLINE auto by_param_and_grad(DTypes t, Call call) {
    if (size_of(t.param) == 2) return by_narrow_dtypes(t, call);
    if (t.param == DType::f64) return call(Native<double>{}, Native<double>{});
    return t.grad == DType::f32 ? call(Native<float>{}, Native<float>{})
                                : call(FloatInDouble{}, Native<double>{});
}

// Calls call(storage, gradient storage, rounding).
template <class Scalars, class Call>
EIGENFILTER_INLINE void by_rounding(DTypes t, const Scalars& s, const Place& place, Call call) {
    if (s.stochastic) {
        const Stochastic rounding(static_cast<std::uint32_t>(s.rounding_seed), place);
        by_narrow_dtypes(t, [&](auto p, auto g) { call(p, g, rounding); });
    } else {
        by_param_and_grad(t, [&](auto p, auto g) { call(p, g, Nearest{}); });
    }
}

template <class Storage>
auto* bits(Storage, void* p) {
    return static_cast<typename Storage::Bits*>(p);
}
template <class Storage>
auto* bits(Storage, const void* p) {
    return static_cast<const typename Storage::Bits*>(p);
}

void perturb_any(DTypes dtypes, const PerturbScalars<double>& s, void* x, const void* from,
                 const void* g, void* b, std::int64_t n, bool stream) {
    by_param_and_grad(dtypes, [&](auto t, auto of_g) {
        perturb<decltype(t), decltype(of_g)>(s, bits(t, x), bits(t, from), bits(of_g, g),
                                             bits(t, b), n, stream);
    });
}

void perturb_hvp_any(DTypes dtypes, const HvpScalars<double>& s, void* x, const void* g,
                     const void* g0, const void* b, std::int64_t n, bool stream) {
    by_param_and_grad(dtypes, [&](auto t, auto of_g) {
        perturb_hvp<decltype(t), decltype(of_g)>(s, bits(t, x), bits(of_g, g), bits(of_g, g0),
                                                 bits(t, b), n, stream);
    });
}

void sgd_step_any(DTypes dtypes, const SgdScalars<double>& s, void* x, const void* g, void* m,
                  const void* b, std::int64_t n, bool stream, const Place& place) {
    by_rounding(dtypes, s, place, [&](auto t, auto of_g, const auto& rounding) {
        sgd_step<decltype(t), decltype(of_g)>(s, bits(t, x), bits(of_g, g), bits(t, m), bits(t, b),
                                              n, stream, rounding);
    });
}

void adamw_step_any(DTypes dtypes, const AdamWScalars<double>& s, void* x, const void* g, void* m,
                    void* v, const void* b, std::int64_t n, bool stream, const Place& place) {
    by_rounding(dtypes, s, place, [&](auto t, auto of_g, const auto& rounding) {
        adamw_step<decltype(t), decltype(of_g)>(s, bits(t, x), bits(of_g, g), bits(t, m),
                                                bits(t, v), bits(t, b), n, stream, rounding);
    });
}

double sum_squares_any(DTypes dtypes, const void* p, const void* weights, std::int64_t n) {
    return by_param_and_grad(dtypes, [&](auto t, auto of_g) {
        return sum_squares<decltype(of_g), decltype(t)>(bits(of_g, p), bits(t, weights), n);
    });
}

// A basis may have any type, a vector float or double.
template <class Call>
auto by_dtypes(DType basis, DType vector, Call call) {
    return by_dtype(basis, [&](auto b) {
        return vector == DType::f64 ? call(b, Native<double>{}) : call(b, Native<float>{});
    });
}

void dots_any(DType basis, DType vector, const void* q, std::int64_t stride, std::int64_t rows,
              const void* w, std::int64_t n, double* out) {
    by_dtypes(basis, vector, [&](auto b, auto v) {
        dots<decltype(b)>(bits(b, q), stride, rows, bits(v, w), n, out);
    });
}

double subtract_any(DType basis, DType vector, const void* q, std::int64_t stride,
                    std::int64_t rows, const double* c, void* w, std::int64_t n) {
    return by_dtypes(basis, vector, [&](auto b, auto v) {
        subtract<decltype(b)>(bits(b, q), stride, rows, c, bits(v, w), n);
        return sum_squares<decltype(v), decltype(v)>(bits(v, w), nullptr, n);
    });
}

// Calls call(T{}) for vectors of T.
template <class Call>
EIGENFILTER_INLINE void by_vector(DType dtype, Call call) {
    dtype == DType::f64 ? call(double{}) : call(float{});
}

void row_dots_any(DType dtype, const void* q, const void* w, std::int64_t n, double* out) {
    by_vector(dtype, [&](auto t) {
        using T = decltype(t);
        row_dots(static_cast<const T*>(q), static_cast<const T*>(w), n, out);
    });
}

void lanczos_step_any(DType dtype, const LanczosStep& rule, void* u, const void* q, const void* w,
                      std::int64_t n, double* out) {
    by_vector(dtype, [&](auto t) {
        using T = decltype(t);
        lanczos_step(rule, static_cast<T*>(u), static_cast<const T*>(q), static_cast<const T*>(w),
                     n, out);
    });
}

void gram_any(DType dtype, const void* rows, std::int64_t stride, std::int64_t count,
              std::int64_t n, double* out) {
    by_vector(dtype,
              [&](auto t) { gram(static_cast<const decltype(t)*>(rows), stride, count, n, out); });
}

void mix_rows_any(DType dtype, const double* factors, void* rows, std::int64_t stride,
                  std::int64_t count, std::int64_t n) {
    by_vector(dtype, [&](auto t) {
        mix_rows(factors, static_cast<decltype(t)*>(rows), stride, count, n);
    });
}

bool has_nonfinite_any(DType dtype, const void* p, std::int64_t n) {
    return by_dtype(dtype, [&](auto t) { return has_nonfinite<decltype(t)>(bits(t, p), n); });
}

}  // namespace

#define EIGENFILTER_STRING(name) #name
#define EIGENFILTER_NAME(name) EIGENFILTER_STRING(name)
#define EIGENFILTER_JOIN(left, right) left##right
#define EIGENFILTER_TABLE(name) EIGENFILTER_JOIN(loops_, name)

extern const Loops EIGENFILTER_TABLE(EIGENFILTER_ISA) = {
    EIGENFILTER_NAME(EIGENFILTER_ISA),
    perturb_any,
    perturb_hvp_any,
    sgd_step_any,
    adamw_step_any,
    sum_squares_any,
    has_nonfinite_any,
    dots_any,
    subtract_any,
    row_dots_any,
    lanczos_step_any,
    gram_any,
    mix_rows_any,
};

}  // namespace eigenfilter::cpu
