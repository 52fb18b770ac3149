// Arguments from Python that are no tensors: checked by name, and never shown in a message, because
// showing a tensor reads its memory, which may be gone.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
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

// The arguments of a call in the order of a function's parameters, whose names are the words of one
// text, or TypeError; a wrong call is described without showing what it was given.
void arrange(const char* function, const char* parameters, const py::args& args,
             const py::kwargs& named, py::handle* arranged, std::size_t count);

// The docstring of a function, with its signature in the form that inspect.signature reads.
std::string documented(const char* function, const char* parameters, const char* text);

namespace detail {

template <class Result, class... Handles, std::size_t... I>
void define(py::module_& module, const char* name, const char* parameters, const char* text,
            Result (*function)(Handles...), std::index_sequence<I...>) {
    const std::string doc = documented(name, parameters, text);
    const auto call = [=](const py::args& args, const py::kwargs& named) -> Result {
        std::array<py::handle, sizeof...(I)> arranged;
        arrange(name, parameters, args, named, arranged.data(), arranged.size());
        return function(arranged[I]...);
    };
    py::options options;
    options.disable_function_signatures();
    module.def(name, call, doc.c_str());
}

}  // namespace detail

// Registers a function of handles, which are passed by position or by name, with an error of our
// own for a wrong call: pybind11's shows all arguments.
template <class Result, class... Handles>
void define(py::module_& module, const char* name, const char* parameters, const char* text,
            Result (*function)(Handles...)) {
    detail::define(module, name, parameters, text, function, std::index_sequence_for<Handles...>{});
}

}  // namespace eigenfilter
