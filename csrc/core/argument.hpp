// How an operation states what it takes: each argument once, with its name and its role.
#pragma once

#include <cstddef>

#include "core/tensors.hpp"

namespace eigenfilter {

// What tensors are to a kernel: it writes them; None may stand for them; they are written where the
// flag that needs them is set, and only there needed; they are gradients, each of which may have
// the next wider dtype; they are a state of the rule, which it reads and writes; they are one
// tensor and no list; that tensor is [b, n], or a single vector [n]; it is [m, n], of a dtype of
// its own; they are corrections, which are whole numbers; they are the scales of a state's codes;
// a state's codes have no sign; the scales are read alone; gradients may be momenta too, in any
// format that a state has.
enum Traits : unsigned {
    kRead = 0,
    kWritten = 1,
    kOptional = 2,
    kSaved = 4,
    kGradients = 8,
    kState = 16 | kWritten,
    kOneTensor = 32,
    kMayBeOne = 64,
    kBasis = 128,
    kCorrections = 256 | kWritten | kOptional,
    kReadScales = 512 | kOptional,
    kScales = kReadScales | kWritten,
    kUnsigned = 1024,
    kMomenta = 2048 | kGradients,
};

// What a scalar must be; one on a GPU is not looked at. A computed one comes from gradients, and is
// not finite where these are not: if it is a tensor it is not looked at either.
enum class Range {
    any,
    finite,
    computed,
    computed_not_zero,
    scale,  // positive, or anything where found_inf is set; None stands for 1
    not_negative,
    fraction,  // at least 0 and less than 1
    count,     // a whole number from 1
    seed,      // a whole number from 0 to 2^24 - 1; None for none
};

// A size of a tensor: a number, or what a call's member says.
template <class Call>
struct Size {
    std::int64_t number = 0;
    std::int64_t Call::* member = nullptr;

    constexpr Size() = default;
    constexpr Size(int number) : number(number) {}
    constexpr Size(std::int64_t Call::* member) : member(member) {}
};

// An argument in Python: a list of those in Tensors, or what is read into a member of Call; without
// either it is the flag found_inf, one float, which has a place of its own.
template <class Call, class Real = Scalar>
struct Argument {
    const char* name;
    unsigned traits = kRead;
    void* const* Tensors::* list = nullptr;
    void* Call::* vectors = nullptr;
    std::int64_t Call::* rows = nullptr;  // what the vectors' sizes and dtype are read into
    std::int64_t Call::* columns = nullptr;
    DType Call::* dtype = nullptr;
    void* Call::* result = nullptr;
    bool Call::* result_is_double = nullptr;
    double* Call::* doubles = nullptr;
    Size<Call> sizes[2]{};
    Real Call::* number = nullptr;
    Range range{};
    int Call::* whole = nullptr;
    bool Call::* flag = nullptr;
    void* const* Tensors::* needs = nullptr;
    bool is_found_inf = false;

    constexpr Argument(const char* name, void* const* Tensors::* list, unsigned traits)
        : name(name), traits(traits), list(list) {}
    // Vectors [b, n]; those after the first are like them, or a basis.
    constexpr Argument(const char* name, void* Call::* vectors, unsigned traits,
                       std::int64_t Call::* rows = nullptr, std::int64_t Call::* columns = nullptr,
                       DType Call::* dtype = nullptr)
        : name(name),
          traits(traits | kOneTensor),
          vectors(vectors),
          rows(rows),
          columns(columns),
          dtype(dtype) {}
    // One float or double, which is written.
    constexpr Argument(const char* name, void* Call::* result, bool Call::* is_double)
        : name(name), traits(kWritten), result(result), result_is_double(is_double) {}
    // Doubles of one or two sizes.
    constexpr Argument(const char* name, double* Call::* doubles, unsigned traits, Size<Call> size,
                       Size<Call> next = {})
        : name(name), traits(traits), doubles(doubles), sizes{size, next} {}
    // Numbers and flags; where they are not 0 or false, they may need a list.
    constexpr Argument(const char* name, Real Call::* number, Range range,
                       void* const* Tensors::* needs = nullptr)
        : name(name), number(number), range(range), needs(needs) {}
    constexpr Argument(const char* name, bool Call::* flag, void* const* Tensors::* needs = nullptr)
        : name(name), flag(flag), needs(needs) {}
    // A whole number from 1.
    constexpr Argument(const char* name, int Call::* whole) : name(name), whole(whole) {}
    constexpr Argument(const char* name, unsigned traits)
        : name(name), traits(traits), is_found_inf(true) {}
};

template <class Op>
constexpr std::size_t kArgumentCount = sizeof Op::kArguments / sizeof *Op::kArguments;

template <class Op, class Holds>
constexpr int count_arguments(Holds holds) {
    int count = 0;
    for (std::size_t i = 0; i < kArgumentCount<Op>; ++i) count += holds(Op::kArguments[i]);
    return count;
}

}  // namespace eigenfilter
