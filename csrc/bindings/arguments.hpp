// Arguments from Python that are no tensors: checked by name, and never shown in a message, because
// showing a tensor reads its memory, which may be gone.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

namespace eigenfilter {

namespace py = pybind11;

[[noreturn]] inline void fail(PyObject* kind, const std::string& message) {
    PyErr_SetString(kind, message.c_str());
    throw py::error_already_set();
}

inline std::string type_name(py::handle value) { return Py_TYPE(value.ptr())->tp_name; }

// A whole number from `least` to `most`.
std::int64_t whole(const char* name, py::handle value, std::int64_t least, std::int64_t most);

// True or False, also as a number or as NumPy's.
bool truth(const char* name, py::handle value);

// How many threads a kernel may use; 0 asks to check the arguments and to run nothing.
int threads_of(py::handle value);

// a * b, both at least 0, or ValueError where no tensor has so many elements.
std::int64_t product(std::int64_t a, std::int64_t b);

// The items of a list or tuple as a tuple of its own: it keeps them while Python code that runs
// meanwhile, or another thread, changes the list.
py::tuple items_of(const char* name, py::handle list, const char* of = " of tensors");

namespace detail {

template <class Result, class... Handles, std::size_t... I>
void define(py::module_& module, const char* name, Result (*function)(Handles...),
            std::index_sequence<I...>) {
    module.def(name, [name, function](const py::args& args, const py::kwargs& named) -> Result {
        constexpr std::size_t count = sizeof...(I);
        if (args.size() != count || !named.empty())
            fail(PyExc_TypeError, std::string(name) + " takes " + std::to_string(count) +
                                      " arguments, all by position, and was given " +
                                      std::to_string(args.size()) + " by position and " +
                                      std::to_string(named.size()) + " by name");
        return function(py::handle(PyTuple_GET_ITEM(args.ptr(), I))...);
    });
}
}  // namespace detail

// Registers a function of handles, with an error of our own for a wrong number of arguments:
// pybind11's shows them all.
template <class Result, class... Handles>
void define(py::module_& module, const char* name, Result (*function)(Handles...)) {
    detail::define(module, name, function, std::index_sequence_for<Handles...>{});
}

}  // namespace eigenfilter
