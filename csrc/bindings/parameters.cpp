// What an optimizer does for every parameter and is slow in Python: `.grad`, and whether its lists
// are still the ones it knows.
#include "parameters.hpp"

namespace eigenfilter {
namespace {

namespace py = pybind11;

PyObject* grad_name() {
    static PyObject* const name = PyUnicode_InternFromString("grad");
    return name;
}

py::tuple gradients(const py::list& params) {
    py::list grads(params.size());
    Py_ssize_t missing = 0;
    for (std::size_t i = 0; i < params.size(); ++i) {
        PyObject* grad = PyObject_GetAttr(PyList_GET_ITEM(params.ptr(), i), grad_name());
        if (grad == nullptr) throw py::error_already_set();
        missing += grad == Py_None;
        PyList_SET_ITEM(grads.ptr(), i, grad);
    }
    return py::make_tuple(std::move(grads), missing);
}

void clear_gradients(const py::list& params) {
    for (std::size_t i = 0; i < params.size(); ++i) {
        if (PyObject_SetAttr(PyList_GET_ITEM(params.ptr(), i), grad_name(), Py_None) != 0)
            throw py::error_already_set();
    }
}

bool same_objects(const py::list& a, const py::list& b) {
    if (a.size() != b.size()) return false;
    for (std::size_t i = 0; i < a.size(); ++i) {
        if (PyList_GET_ITEM(a.ptr(), i) != PyList_GET_ITEM(b.ptr(), i)) return false;
    }
    return true;
}

bool same_entries(const py::dict& state, const py::list& entries, const py::str& key,
                  const py::list& values) {
    if (state.size() != entries.size() || entries.size() != values.size()) return false;
    Py_ssize_t position = 0;
    PyObject* entry = nullptr;
    for (std::size_t i = 0; PyDict_Next(state.ptr(), &position, nullptr, &entry); ++i) {
        if (entry != PyList_GET_ITEM(entries.ptr(), i) || !PyDict_Check(entry)) return false;
        PyObject* value = PyDict_GetItemWithError(entry, key.ptr());
        if (value == nullptr) {
            if (PyErr_Occurred()) throw py::error_already_set();
            value = Py_None;
        }
        if (value != PyList_GET_ITEM(values.ptr(), i)) return false;
    }
    return true;
}

}  // namespace

void register_parameters(py::module_& module) {
    module.def("gradients", &gradients);
    module.def("clear_gradients", &clear_gradients);
    module.def("same_objects", &same_objects);
    module.def("same_entries", &same_entries);
}

}  // namespace eigenfilter
