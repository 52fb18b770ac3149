// What an optimizer does for every parameter and is slow in Python: `.grad`, and whether its lists
// are still the ones it knows.
#include "parameters.hpp"

namespace eigenfilter {
namespace {

namespace py = pybind11;

// `.grad` of one parameter after another: the descriptor is looked up once a type, not once a
// tensor.
class Grad {
 public:
    py::object get(PyObject* param) {
        find(param);
        PyObject* grad =
            slot_ != nullptr ? slot_->get(param, slot_->closure) : PyObject_GetAttr(param, name());
        if (grad == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(grad);
    }

    void clear(PyObject* param) {
        find(param);
        const int failed = slot_ != nullptr ? slot_->set(param, Py_None, slot_->closure)
                                            : PyObject_SetAttr(param, name(), Py_None);
        if (failed) throw py::error_already_set();
    }

 private:
    static PyObject* name() {
        static PyObject* const interned = PyUnicode_InternFromString("grad");
        return interned;
    }

    void find(PyObject* param) {
        if (Py_TYPE(param) == type_) return;
        type_ = Py_TYPE(param);
        const auto found = py::reinterpret_steal<py::object>(
            PyObject_GetAttr(reinterpret_cast<PyObject*>(type_), name()));
        PyErr_Clear();
        const bool plain = found && Py_IS_TYPE(found.ptr(), &PyGetSetDescr_Type);
        slot_ = plain ? reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset : nullptr;
    }

    PyTypeObject* type_ = nullptr;  // of the last parameter
    PyGetSetDef* slot_ = nullptr;   // its type's own getter and setter, or null: go the long way
};

py::tuple gradients(const py::list& params) {
    Grad grad;
    py::list grads(params.size());
    Py_ssize_t missing = 0;
    for (std::size_t i = 0; i < params.size(); ++i) {
        py::object value = grad.get(PyList_GET_ITEM(params.ptr(), i));
        missing += value.is_none();
        PyList_SET_ITEM(grads.ptr(), i, value.release().ptr());
    }
    return py::make_tuple(std::move(grads), missing);
}

void clear_gradients(const py::list& params) {
    Grad grad;
    for (std::size_t i = 0; i < params.size(); ++i) grad.clear(PyList_GET_ITEM(params.ptr(), i));
}

bool same_objects(const py::list& a, const py::list& b) {
    if (a.size() != b.size()) return false;
    for (std::size_t i = 0; i < a.size(); ++i) {
        if (PyList_GET_ITEM(a.ptr(), i) != PyList_GET_ITEM(b.ptr(), i)) return false;
    }
    return true;
}

bool same_entries(const py::dict& state, const py::list& entries, const py::tuple& keys,
                  const py::list& values) {
    Py_ssize_t position = 0;
    std::size_t i = 0;
    PyObject* entry = nullptr;
    while (PyDict_Next(state.ptr(), &position, nullptr, &entry)) {
        if (!PyDict_Check(entry)) return false;
        if (PyDict_GET_SIZE(entry) == 0) continue;  // a defaultdict makes them when it is read
        if (i >= entries.size() || entry != PyList_GET_ITEM(entries.ptr(), i)) return false;
        for (std::size_t k = 0; k < keys.size(); ++k) {
            PyObject* value = PyDict_GetItemWithError(entry, PyTuple_GET_ITEM(keys.ptr(), k));
            if (value == nullptr) {
                if (PyErr_Occurred()) throw py::error_already_set();
                value = Py_None;
            }
            if (value != PyList_GET_ITEM(values.ptr(), keys.size() * i + k)) return false;
        }
        ++i;
    }
    return i == entries.size();
}

}  // namespace

void register_parameters(py::module_& module) {
    module.def("gradients", &gradients);
    module.def("clear_gradients", &clear_gradients);
    module.def("same_objects", &same_objects);
    module.def("same_entries", &same_entries);
}

}  // namespace eigenfilter
