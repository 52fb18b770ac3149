// From dtypes to the types of loops; part of loops.cpp.
#pragma once

#include "simd.hpp"
// The templates of rules see the functions of vectors, declared before.
#include "core/compression.hpp"
#include "isa.hpp"

namespace eigenfilter::cpu {
namespace {

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
EIGENFILTER_INLINE auto by_dtypes(DTypes t, Call call) {
    if (size_of(t.param) == 2) return by_narrow_dtypes(t, call);
    if (t.param == DType::f64) return call(Native<double>{}, Native<double>{});
    return t.grad == DType::f32 ? call(Native<float>{}, Native<float>{})
                                : call(FloatInDouble{}, Native<double>{});
}

// Calls call(storage) for vectors, which are of floats or doubles.
template <class Call>
EIGENFILTER_INLINE auto by_vector(DType dtype, Call call) {
    return dtype == DType::f64 ? call(Native<double>{}) : call(Native<float>{});
}

}  // namespace
}  // namespace eigenfilter::cpu
