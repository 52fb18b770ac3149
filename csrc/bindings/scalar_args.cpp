// Numbers from Python, and what they must be.
#include <cmath>

#include "tensor_args.hpp"

namespace eigenfilter {
namespace {

struct Requirement {
    bool (*holds)(double value);
    const char* text;
};

Requirement requirement_of(Range range) {
    switch (range) {
        case Range::finite:
        case Range::computed: return {[](double v) { return std::isfinite(v); }, "finite"};
        case Range::computed_not_zero:
            return {[](double v) { return std::isfinite(v) && v != 0; }, "finite and not 0"};
        case Range::fraction:
            return {[](double v) { return v >= 0 && v < 1; }, "at least 0 and less than 1"};
        case Range::not_negative:
            return {[](double v) { return v >= 0 && std::isfinite(v); }, "at least 0 and finite"};
        case Range::positive:
            return {[](double v) { return v > 0 && std::isfinite(v); }, "positive and finite"};
        case Range::count:
            return {[](double v) { return v >= 1 && v <= 0x1p53 && v == std::floor(v); },
                    "a whole number from 1 to 2**53"};
        case Range::seed:
            return {[](double v) { return v >= 0 && v < 0x1p24 && v == std::floor(v); },
                    "a whole number from 0 to 2**24 - 1"};
        case Range::any: break;
    }
    return {[](double) { return true; }, ""};
}

}  // namespace

void require_in_range(const char* name, double value, Range range) {
    const Requirement required = requirement_of(range);
    if (!required.holds(value))
        fail(PyExc_ValueError, std::string(name) + " must be " + required.text + ", and is " +
                                   std::string(py::str(py::float_(value))));
}

double number_of(const char* name, py::handle value) {
    if (PyComplex_Check(value.ptr()) || type_name(value).find("complex") != std::string::npos)
        fail(PyExc_TypeError,
             std::string(name) + " must be a real number, not " + type_name(value));
    if (!PyFloat_CheckExact(value.ptr()) && !PyLong_CheckExact(value.ptr())) ++Reader::asked_others;
    const double number = PyFloat_AsDouble(value.ptr());
    if (number != -1 || !PyErr_Occurred()) return number;
    if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
        PyErr_Clear();
        fail(PyExc_ValueError,
             std::string(name) + " is beyond the largest float: pass a finite number");
    }
    if (!PyErr_ExceptionMatches(PyExc_TypeError) && !PyErr_ExceptionMatches(PyExc_ValueError))
        throw py::error_already_set();
    PyErr_Clear();
    fail(PyExc_TypeError, std::string(name) + " must be a number or a one-element tensor, and is " +
                              (value.is_none() ? "None" : "a " + type_name(value)));
}

bool is_tensor(py::handle value) {
    if (PyFloat_CheckExact(value.ptr()) || PyLong_CheckExact(value.ptr())) return false;
    return py::hasattr(py::type::of(value), "__dlpack_c_exchange_api__");
}

}  // namespace eigenfilter
