#include "arguments.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <sstream>
#include <vector>

#include "tensor_args.hpp"

namespace eigenfilter {
namespace {

constexpr std::int64_t kMostThreads = 1024;  // more would only fail to start

std::string between(std::int64_t least, std::int64_t most) {
    const std::string text = "a whole number of at least " + std::to_string(least);
    return most == INT64_MAX ? text : text + " and at most " + std::to_string(most);
}

}  // namespace

std::int64_t whole(const char* name, py::handle value, std::int64_t least, std::int64_t most) {
    const std::string wanted = std::string(name) + " must be " + between(least, most);
    if (!PyIndex_Check(value.ptr())) fail(PyExc_TypeError, wanted + ", not " + type_name(value));
    const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    if (!number) throw py::error_already_set();
    int overflow = 0;
    const long long result = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
    if (result == -1 && overflow == 0 && PyErr_Occurred()) throw py::error_already_set();
    if (overflow != 0) fail(PyExc_ValueError, wanted + ", and is far outside of it");
    if (result < least || result > most)
        fail(PyExc_ValueError, wanted + ", and is " + std::to_string(result));
    return result;
}

bool truth(const char* name, py::handle value) {
    if (value.ptr() == Py_True) return true;
    if (value.ptr() == Py_False) return false;
    const std::string type = type_name(value);
    if (!PyLong_Check(value.ptr()) && type != "numpy.bool" && type != "numpy.bool_")
        fail(PyExc_TypeError, std::string(name) + " must be True or False, not " + type);
    const int result = PyObject_IsTrue(value.ptr());
    if (result < 0) throw py::error_already_set();
    return result != 0;
}

int threads_of(py::handle value) {
    return static_cast<int>(std::min(whole("num_threads", value, 0, INT64_MAX), kMostThreads));
}

py::tuple items_of(const char* name, py::handle list, const char* of) {
    PyObject* items = nullptr;
    if (PyTuple_CheckExact(list.ptr())) return py::reinterpret_borrow<py::tuple>(list);
    if (PyList_Check(list.ptr()))
        items = PyList_AsTuple(list.ptr());
    else if (PyTuple_Check(list.ptr()))
        items = PyTuple_GetSlice(list.ptr(), 0, PyTuple_GET_SIZE(list.ptr()));
    else
        fail(PyExc_TypeError, std::string(name) + " must be a list or tuple" + of);
    if (items == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::tuple>(items);
}

namespace {

std::vector<std::string> words_of(const char* text) {
    std::istringstream words(text);
    return {std::istream_iterator<std::string>(words), {}};
}

std::string joined(const std::vector<std::string>& words) {
    std::string text;
    for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
    return text;
}

[[noreturn]] void refuse(const char* function, const char* parameters, const std::string& reason) {
    fail(PyExc_TypeError,
         std::string(function) + "(" + joined(words_of(parameters)) + ") was " + reason);
}

// Where a name stands among the words of a text, or -1.
int position_of(PyObject* name, const char* words) {
    for (int position = 0; *words != '\0'; ++position) {
        const std::size_t size = std::strcspn(words, " ");
        if (PyUnicode_GET_LENGTH(name) == static_cast<Py_ssize_t>(size) &&
            PyUnicode_CompareWithASCIIString(name, std::string(words, size).c_str()) == 0)
            return position;
        words += size + (words[size] == ' ');
    }
    return -1;
}

}  // namespace

void arrange(const char* function, const char* parameters, const py::args& args,
             const py::kwargs& named, py::handle* arranged, std::size_t count) {
    if (args.size() > count)
        refuse(function, parameters, "given " + std::to_string(args.size()) + " arguments");
    for (std::size_t i = 0; i < args.size(); ++i) arranged[i] = PyTuple_GET_ITEM(args.ptr(), i);
    if (named.empty() && args.size() == count) return;
    for (const auto& [name, value] : named) {
        const int position = position_of(name.ptr(), parameters);
        if (position < 0) refuse(function, parameters, "given an argument of another name");
        if (arranged[position])
            refuse(function, parameters, "given " + words_of(parameters)[position] + " twice");
        arranged[position] = value;
    }
    for (std::size_t i = 0; i < count; ++i) {
        if (!arranged[i]) refuse(function, parameters, "not given " + words_of(parameters)[i]);
    }
}

std::string documented(const char* function, const char* parameters, const char* text) {
    return std::string(function) + "(" + joined(words_of(parameters)) + ")\n--\n\n" + text;
}

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
        case Range::scale:
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
