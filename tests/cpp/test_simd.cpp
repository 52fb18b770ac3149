// Vectors: blocks and tails touch their own elements alone, and conversions round as IEEE 754 does.
#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "numbers.hpp"

namespace {

// Elements beside a page that nothing may touch: an access to it ends the test.
template <class T>
class Guarded {
 public:
    // The elements end where that page begins, or begin where it ends.
    Guarded(std::int64_t count, bool at_end) : page_(sysconf(_SC_PAGESIZE)) {
        base_ = static_cast<char*>(
            mmap(nullptr, 3 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        REQUIRE(base_ != MAP_FAILED);
        REQUIRE(mprotect(base_ + page_, page_, PROT_READ | PROT_WRITE) == 0);
        first_ = reinterpret_cast<T*>(base_ + page_ + (at_end ? page_ - count * sizeof(T) : 0));
    }
    ~Guarded() { munmap(base_, 3 * page_); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;

    T* get() { return first_; }

 private:
    std::size_t page_;
    char* base_;
    T* first_;
};

// Elements with canaries beside them; the elements start aligned as for a streamed store.
template <class T>
class WithCanaries {
 public:
    static constexpr int kBeside = 64;

    explicit WithCanaries(int count) : count_(count) {
        for (auto& byte : bytes_) byte = kCanary;
    }

    T* get() { return reinterpret_cast<T*>(bytes_ + kBeside); }

    bool are_alive() const {
        const unsigned char* end = bytes_ + kBeside + count_ * sizeof(T);
        for (const unsigned char* p = bytes_; p != bytes_ + kBeside; ++p) {
            if (*p != kCanary) return false;
        }
        for (const unsigned char* p = end; p != bytes_ + sizeof bytes_; ++p) {
            if (*p != kCanary) return false;
        }
        return true;
    }

 private:
    static constexpr unsigned char kCanary = 0xa5;
    int count_;
    alignas(64) unsigned char bytes_[kBeside + 16 * sizeof(double) + kBeside];
};

template <class T>
T element(int i) {
    return static_cast<T>(3 * i + 1);
}

template <class Storage>
constexpr int kLanesOfUpdates =
    kRegisterBytes / static_cast<int>(sizeof(typename Storage::Arithmetic));

template <class Storage, int L, class Bits>
void check_reads() {
    for (int count = 0; count <= L; ++count) {
        for (const bool at_end : {false, true}) {
            CAPTURE(count);
            Guarded<Bits> memory(count, at_end);
            for (int i = 0; i < count; ++i) memory.get()[i] = element<Bits>(i);
            const auto v = Partial<Storage, L>{opaque(count)}.read(memory.get());
            for (int i = 0; i < L; ++i) CHECK(v[i] == (i < count ? element<Bits>(i) : Bits{}));
        }
    }
    Guarded<Bits> memory(L, true);
    for (int i = 0; i < L; ++i) memory.get()[i] = element<Bits>(i);
    const auto whole = Whole<Storage, L>{}.read(memory.get());
    for (int i = 0; i < L; ++i) CHECK(whole[i] == element<Bits>(i));
}

// Checks that write(io, memory, vector) writes the first `count` lanes and no more.
template <class Storage, int L, class Io, class Write>
void check_write(Io io, int count, Write write) {
    using Bits = typename Storage::Bits;
    CAPTURE(count);
    typename Io::V v;
    for (int i = 0; i < L; ++i) v[i] = element<Bits>(i);
    WithCanaries<Bits> memory(count);
    write(io, memory.get(), v);
    end_of_streaming();
    CHECK(memory.are_alive());
    for (int i = 0; i < count; ++i) CHECK(memory.get()[i] == element<Bits>(i));
    Guarded<Bits> guarded(count, true);
    write(io, guarded.get(), v);
}

template <class Storage, int L, class Write>
void check_writes(Write write) {
    for (int count = 0; count <= L; ++count) {
        check_write<Storage, L>(Partial<Storage, L>{opaque(count)}, count, write);
    }
    check_write<Storage, L>(Whole<Storage, L>{}, L, write);
    check_write<Storage, L>(Streamed<Storage, L>{}, L, write);
}

// How a 16-bit format is converted: in vectors of L lanes, or number by number.
template <class Storage, int L>
struct InVectors {
    static constexpr Format kFormat = ::kFormat<Storage>;
    static std::vector<float> widened(const std::vector<std::uint16_t>& numbers) {
        return in_vectors<float, L>(numbers, [](auto v) { return Storage::template widen<L>(v); });
    }
    static std::vector<std::uint16_t> narrowed(const std::vector<float>& numbers) {
        return in_vectors<std::uint16_t, L>(numbers,
                                            [](auto v) { return Storage::template narrow<L>(v); });
    }
};
struct AsNumbers {
    static constexpr Format kFormat = ::kFormat<Float16>;
    static std::vector<float> widened(const std::vector<std::uint16_t>& numbers) {
        std::vector<float> results;
        for (const std::uint16_t number : numbers) results.push_back(half_to_float(number));
        return results;
    }
    static std::vector<std::uint16_t> narrowed(const std::vector<float>& numbers) {
        std::vector<std::uint16_t> results;
        for (const float number : numbers) results.push_back(float_to_half(number));
        return results;
    }
};

std::uint32_t sign_of(std::uint32_t bits) { return bits & 0x8000u; }

}  // namespace

#define STORAGES Native<float>, Native<double>, BFloat16, Float16, FloatInDouble
// An update converts as many elements at a time as a register has floats, a sum as many as it has
// doubles.
#define CONVERSIONS                                                   \
    InVectors<BFloat16, 2 * kDoubles>, InVectors<BFloat16, kDoubles>, \
        InVectors<Float16, 2 * kDoubles>, InVectors<Float16, kDoubles>, AsNumbers

TEST_CASE("vectors are as wide as the registers of the instruction set") {
    const std::string isa = TESTED_ISA;
    CHECK(kRegisterBytes == (isa == "avx512" ? 64 : isa == "avx2" ? 32 : 16));
}

TEST_CASE_TEMPLATE("a block or a tail reads its own elements alone", Storage, STORAGES) {
    check_reads<Storage, kLanesOfUpdates<Storage>, typename Storage::Bits>();
    check_reads<Storage, kDoubles, typename Storage::Bits>();
    check_reads<Storage, kLanesOfUpdates<Storage>, typename Storage::Arithmetic>();
}

TEST_CASE_TEMPLATE("a block or a tail writes its own elements alone", Storage, STORAGES) {
    const auto write = [](auto io, auto* p, auto v) { io.write(p, v); };
    const auto write_only = [](auto io, auto* p, auto v) { io.write_only(p, v); };
    check_writes<Storage, kLanesOfUpdates<Storage>>(write);
    check_writes<Storage, kLanesOfUpdates<Storage>>(write_only);
    check_writes<Storage, kDoubles>(write);
}

TEST_CASE_TEMPLATE("inside a tail, the lanes beyond its elements are zero", Storage, STORAGES) {
    using Bits = typename Storage::Bits;
    constexpr int L = kDoubles;
    Vec<Bits, L> v{};
    v += Bits{7};
    for (int count = 0; count <= L; ++count) {
        CAPTURE(count);
        const auto inside = Partial<Storage, L>{opaque(count)}.inside(v);
        for (int i = 0; i < L; ++i) CHECK(inside[i] == (i < count ? Bits{7} : Bits{}));
    }
    const auto whole = Whole<Storage, L>{}.inside(v);
    for (int i = 0; i < L; ++i) CHECK(whole[i] == Bits{7});
}

TEST_CASE_TEMPLATE("each of the 65,536 values widens exactly and narrows back", T, CONVERSIONS) {
    const Format format = T::kFormat;
    const auto numbers = range<std::uint16_t>(0, 0x10000);
    const std::vector<float> wide = T::widened(numbers);
    const std::vector<std::uint16_t> back = T::narrowed(wide);
    Failures wrong_values, wrong_bits;
    for (const std::uint16_t bits : numbers) {
        if (format.is_nan(bits)) {
            wrong_values.add_unless(std::isnan(wide[bits]), bits);
            wrong_bits.add_unless(format.is_nan(back[bits]) && sign_of(back[bits]) == sign_of(bits),
                                  bits);
        } else {
            wrong_values.add_unless(is_same<double>(wide[bits], format.value(bits)), bits);
            wrong_bits.add_unless(back[bits] == bits, bits);
        }
    }
    CHECK_NONE(wrong_values);
    CHECK_NONE(wrong_bits);
}

// Infinity is one of the neighbors here: it lies where the next number would.
TEST_CASE_TEMPLATE("narrowing is to the nearer of two neighbors, or the even", T, CONVERSIONS) {
    const Format format = T::kFormat;
    for (const std::uint32_t sign : {0u, 0x8000u}) {
        const float outwards = sign != 0 ? -INFINITY : INFINITY;
        const auto lower = range<std::uint16_t>(sign, sign | format.infinity());
        std::vector<float> middle, below, above;
        for (const std::uint32_t bits : lower) {
            const double low = format.value_below_infinity(bits);
            const double high = format.value_below_infinity(bits + 1);
            middle.push_back(static_cast<float>(low + (high - low) / 2));
            REQUIRE(middle.back() == low + (high - low) / 2);
            below.push_back(std::nextafter(middle.back(), 0.0f));
            above.push_back(std::nextafter(middle.back(), outwards));
        }
        const auto of_middle = T::narrowed(middle);
        const auto of_below = T::narrowed(below), of_above = T::narrowed(above);
        Failures ties, not_nearest;
        for (std::size_t i = 0; i < lower.size(); ++i) {
            const std::uint32_t bits = lower[i];
            ties.add_unless(of_middle[i] == bits + (bits & 1u), bits);
            not_nearest.add_unless(of_below[i] == bits && of_above[i] == bits + 1, bits);
        }
        CHECK_NONE(ties);
        CHECK_NONE(not_nearest);
    }
}

TEST_CASE_TEMPLATE("narrowing keeps signs, infinities and NaN", T, CONVERSIONS) {
    using Limits = std::numeric_limits<float>;
    const std::uint16_t infinity = T::kFormat.infinity();
    const std::vector<float> sizes = {INFINITY, Limits::max(), Limits::denorm_min(), 0.0f};
    std::vector<float> negative;
    for (const float size : sizes) negative.push_back(-size);
    CHECK(T::narrowed(sizes) == std::vector<std::uint16_t>{infinity, infinity, 0, 0});
    const std::uint16_t minus_zero = 0x8000, minus_infinity = minus_zero | infinity;
    CHECK(T::narrowed(negative) ==
          std::vector<std::uint16_t>{minus_infinity, minus_infinity, minus_zero, minus_zero});
    for (const std::uint32_t nan : {0x7f800001u, 0x7fc00000u, 0xff800001u, 0xffffffffu}) {
        CAPTURE(nan);
        const std::uint16_t bits = T::narrowed({float_of(nan)}).front();
        CHECK(T::kFormat.is_nan(bits));
        CHECK(sign_of(bits) == sign_of(nan >> 16));
    }
}

TEST_CASE("floats widen to doubles exactly") {
    const std::vector<float> numbers = all_kinds_of_numbers<float>(20'000, 5);
    const std::vector<double> wide = in_vectors<double, kDoubles>(
        numbers, [](auto v) { return FloatInDouble::widen<kDoubles>(v); });
    Failures failures;
    for (std::size_t i = 0; i < numbers.size(); ++i)
        failures.add_unless(is_same<double>(wide[i], numbers[i]), bits_of(numbers[i]));
    CHECK_NONE(failures);
}

TEST_CASE("doubles narrow to the nearer of two floats, or the even") {
    std::vector<double> numbers;
    std::vector<float> expected;
    for (const float value : all_kinds_of_numbers<float>(20'000, 6)) {
        numbers.push_back(value);
        expected.push_back(value);
        const float next = std::nextafter(value, std::copysign(INFINITY, value));
        if (!std::isfinite(next)) continue;
        const double middle = value + (static_cast<double>(next) - value) / 2;
        for (const double number :
             {middle, std::nextafter(middle, value), std::nextafter(middle, next)}) {
            const double to_value = std::fabs(number - value), to_next = std::fabs(next - number);
            const bool is_even = bits_of(value) % 2 == 0;
            numbers.push_back(number);
            expected.push_back(to_value < to_next || (to_value == to_next && is_even) ? value
                                                                                      : next);
        }
    }
    const std::vector<float> narrow = in_vectors<float, kDoubles>(
        numbers, [](auto v) { return FloatInDouble::narrow<kDoubles>(v); });
    Failures failures;
    for (std::size_t i = 0; i < numbers.size(); ++i)
        failures.add_unless(is_same(narrow[i], expected[i]), bits_of(expected[i]));
    CHECK_NONE(failures);
}

TEST_CASE_TEMPLATE("a square root is the correctly rounded one", T, float, double) {
    const std::vector<T> numbers = all_kinds_of_numbers<T>(20'000, 7);
    const std::vector<T> roots = in_vectors<T, kRegisterBytes / static_cast<int>(sizeof(T))>(
        numbers, [](auto v) { return eigenfilter::square_root(v); });
    Failures failures;
    for (std::size_t i = 0; i < numbers.size(); ++i)
        failures.add_unless(is_same(roots[i], std::sqrt(numbers[i])), i);
    CHECK_NONE(failures);
}

TEST_CASE("whole numbers below 2^31 become floats, and floats whole numbers, as in C++") {
    constexpr int L = 2 * kDoubles;
    std::vector<std::uint32_t> whole;
    std::vector<float> real;
    std::mt19937 random(8);
    for (int i = 0; i < 20'000; ++i) {
        whole.push_back((random() & 0x7fffffffu) >> random() % 31);
        real.push_back(static_cast<float>(whole.back()) * 0.37f);
    }
    const std::vector<float> to_real =
        in_vectors<float, L>(whole, [](auto v) { return eigenfilter::real(v); });
    const std::vector<std::uint32_t> to_whole =
        in_vectors<std::uint32_t, L>(real, [](auto v) { return eigenfilter::truncate(v); });
    Failures wrong_real, wrong_whole;
    for (std::size_t i = 0; i < whole.size(); ++i) {
        wrong_real.add_unless(to_real[i] == static_cast<float>(whole[i]), whole[i]);
        wrong_whole.add_unless(to_whole[i] == static_cast<std::uint32_t>(real[i]), whole[i]);
    }
    CHECK_NONE(wrong_real);
    CHECK_NONE(wrong_whole);
}
