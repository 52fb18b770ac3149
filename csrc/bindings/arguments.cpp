#include "arguments.hpp"

#include <algorithm>

#include "operands.hpp"

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

std::int64_t product(std::int64_t a, std::int64_t b) {
    std::int64_t result = 0;
    if (__builtin_mul_overflow(a, b, &result) || result > (INT64_MAX >> 4))
        fail(PyExc_ValueError, std::to_string(a) + " times " + std::to_string(b) +
                                   " are more elements than a tensor can have");
    return result;
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

}  // namespace eigenfilter
