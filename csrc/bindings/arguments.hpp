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

// The items of a list or tuple as a tuple of its own: it keeps them while Python code that runs
// meanwhile, or another thread, changes the list.
py::tuple items_of(const char* name, py::handle list, const char* of = " of tensors");

// The arguments of a call in the order of a function's parameters, whose names are the words of one
// text, or TypeError; a wrong call is described without showing what it was given.
void arrange(const char* function, const char* parameters, const py::args& args,
             const py::kwargs& named, py::handle* arranged, std::size_t count);

// The docstring of a function, with its signature in the form that inspect.signature reads.
std::string documented(const char* function, const char* parameters, const char* text);

// Registers a function of Count arguments, which it is given in the order of its parameters. They
// are passed by position or by name, with an error of our own for a wrong call: pybind11's shows
// them all.
template <std::size_t Count, class Function>
void define_call(py::module_& module, const char* name, const std::string& parameters,
                 const char* text, Function function) {
    py::options options;
    options.disable_function_signatures();  // the docstring has one
    const auto call = [=](const py::args& args, const py::kwargs& named) {
        std::array<py::handle, Count> arranged;
        arrange(name, parameters.c_str(), args, named, arranged.data(), Count);
        return function(arranged.data());
    };
    module.def(name, call, documented(name, parameters.c_str(), text).c_str());
}

template <class Result, class... Handles, std::size_t... I>
auto of_array(Result (*function)(Handles...), std::index_sequence<I...>) {
    return [=](const py::handle* arguments) { return function(py::handle(arguments[I])...); };
}

// The same for a function of handles.
template <class Result, class... Handles>
void define(py::module_& module, const char* name, const char* parameters, const char* text,
            Result (*function)(Handles...)) {
    define_call<sizeof...(Handles)>(module, name, parameters, text,
                                    of_array(function, std::index_sequence_for<Handles...>{}));
}

}  // namespace eigenfilter
