// What an optimizer does for every parameter and is slow in Python: `.grad`, and whether its lists
// are still the ones it knows; and lists that are read faster than Python's.
#include "param_lists.hpp"

#include <string>
#include <utility>

#include "reader.hpp"

namespace eigenfilter {

TensorList::TensorList(py::handle tensors, bool hold, bool trust)
    : tensors_(py::reinterpret_steal<py::tuple>(PySequence_Tuple(tensors.ptr()))) {
    if (!tensors_) throw py::error_already_set();
    if (trust) known_ = std::make_shared<std::vector<void*>>(size(), nullptr);
    if (!hold) return;
    Reader reader;
    std::vector<py::object> held;
    for (std::size_t i = 0; i < size(); ++i) {
        PyObject* object = PyTuple_GET_ITEM(tensors_.ptr(), i);
        reader.read(object, {"tensors", static_cast<Py_ssize_t>(i)}, held);
        dlpack::Managed* managed = nullptr;
        // What goes by a local shard is not held; the next error is its, and is of no interest.
        if (reader.api()->managed_tensor_from_py_object(object, &managed) == 0)
            held_.emplace_back(managed);
        else
            PyErr_Clear();
    }
}

py::object TensorList::get(py::handle index) const {
    if (!PyIndex_Check(index.ptr()))
        fail(PyExc_TypeError, "a TensorList is indexed by a whole number, not " + type_name(index));
    const Py_ssize_t i = PyNumber_AsSsize_t(index.ptr(), PyExc_IndexError);
    if (i == -1 && PyErr_Occurred()) throw py::error_already_set();
    const auto n = static_cast<Py_ssize_t>(size());
    if (i < -n || i >= n) throw py::index_error("no such tensor in this list");
    return py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(tensors_.ptr(), i < 0 ? i + n : i));
}

TensorList* tensor_list(py::handle object) {
    if (!py::isinstance<TensorList>(object)) return nullptr;
    auto* const instance = reinterpret_cast<py::detail::instance*>(object.ptr());
    if (!instance->get_value_and_holder().holder_constructed())
        fail(PyExc_TypeError, "a TensorList was never initialized: make it by TensorList(tensors)");
    return object.cast<TensorList*>();
}

namespace {

TensorList& self_of(py::handle object) {
    TensorList* const self = tensor_list(object);
    if (self == nullptr) fail(PyExc_TypeError, type_name(object) + " is not a TensorList");
    return *self;
}

// The list that a method was called for, with `count` arguments in all.
TensorList& self_of(const py::args& args, std::size_t count) {
    if (args.size() != count)
        fail(PyExc_TypeError, "a method of TensorList takes " + std::to_string(count - 1) +
                                  " arguments, and was given another number");
    return self_of(py::object(args[0]));
}

// TensorList(tensors, *, hold=False, trust=False), whatever it is given: see `define`.
std::unique_ptr<TensorList> make_tensor_list(const py::args& args, const py::kwargs& named) {
    const auto chosen = [&](const char* name) {
        return named.contains(name) && truth(name, py::object(named[name]));
    };
    const std::size_t known = std::size_t{named.contains("hold")} + named.contains("trust");
    if (args.size() != 1 || named.size() != known)
        fail(PyExc_TypeError,
             "a TensorList is made by TensorList(tensors, hold=False, trust=False)");
    const bool hold = chosen("hold"), trust = chosen("trust");
    const py::object tensors = args[0];
    if (!PySequence_Check(tensors.ptr()) && !PyIter_Check(tensors.ptr()) &&
        !py::hasattr(tensors, "__iter__"))
        fail(PyExc_TypeError, "tensors must be a list of tensors, not " + type_name(tensors));
    return std::make_unique<TensorList>(tensors, hold, trust);
}

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
        const auto attribute = py::reinterpret_steal<py::object>(
            PyObject_GetAttr(reinterpret_cast<PyObject*>(type_), name()));
        PyErr_Clear();
        slot_ = nullptr;
        if (!attribute || !Py_IS_TYPE(attribute.ptr(), &PyGetSetDescr_Type)) return;
        const auto* descriptor = reinterpret_cast<PyGetSetDescrObject*>(attribute.ptr());
        // Another class may have borrowed the getter: only its own kind may be passed to it.
        if (PyType_IsSubtype(type_, descriptor->d_common.d_type)) slot_ = descriptor->d_getset;
    }

    PyTypeObject* type_ = nullptr;  // of the last parameter
    PyGetSetDef* slot_ = nullptr;   // its type's own getter and setter, or null: go the long way
};

// A getter may be Python code, which may change the list: what is read is a copy of it.
py::tuple gradients(py::handle params) {
    const py::tuple read = items_of("params", params);
    Grad grad;
    py::list grads(read.size());
    for (std::size_t i = 0; i < read.size(); ++i) grads[i] = py::none();
    Py_ssize_t missing = 0;
    for (std::size_t i = 0; i < read.size(); ++i) {
        py::object value = grad.get(PyTuple_GET_ITEM(read.ptr(), i));
        missing += value.is_none();
        if (PyList_SetItem(grads.ptr(), i, value.release().ptr()) != 0)
            throw py::error_already_set();
    }
    return py::make_tuple(std::move(grads), missing);
}

void clear_gradients(py::handle params) {
    const py::tuple read = items_of("params", params);
    Grad grad;
    for (std::size_t i = 0; i < read.size(); ++i) grad.clear(PyTuple_GET_ITEM(read.ptr(), i));
}

bool same_objects(py::handle a, py::handle b) {
    if (!PyList_Check(a.ptr()) || !PyList_Check(b.ptr()))
        fail(PyExc_TypeError, "same_objects compares two lists");
    const Py_ssize_t n = PyList_GET_SIZE(a.ptr());
    if (n != PyList_GET_SIZE(b.ptr())) return false;
    for (Py_ssize_t i = 0; i < n; ++i) {
        if (PyList_GET_ITEM(a.ptr(), i) != PyList_GET_ITEM(b.ptr(), i)) return false;
    }
    return true;
}

// Whether the i-th item of a list, which may have fewer, is an object.
bool is_item(py::handle list, std::size_t i, PyObject* object) {
    return i < static_cast<std::size_t>(PyList_GET_SIZE(list.ptr())) &&
           PyList_GET_ITEM(list.ptr(), i) == object;
}

// Keys that compare themselves may run Python code: entries are held, and sizes asked again.
bool same_entries(py::handle state, py::handle entries, py::handle keys, py::handle values) {
    if (!PyDict_Check(state.ptr()) || !PyList_Check(entries.ptr()) || !PyTuple_Check(keys.ptr()) ||
        !PyList_Check(values.ptr()))
        fail(PyExc_TypeError, "same_entries takes a dict, a list, a tuple and a list");
    const auto count = static_cast<std::size_t>(PyTuple_GET_SIZE(keys.ptr()));
    Py_ssize_t position = 0;
    std::size_t i = 0;
    PyObject* next = nullptr;
    while (PyDict_Next(state.ptr(), &position, nullptr, &next)) {
        if (!PyDict_Check(next)) return false;
        if (PyDict_GET_SIZE(next) == 0) continue;  // a defaultdict makes them when it is read
        if (!is_item(entries, i, next)) return false;
        const auto entry = py::reinterpret_borrow<py::object>(next);
        for (std::size_t k = 0; k < count; ++k) {
            PyObject* value = PyDict_GetItemWithError(entry.ptr(), PyTuple_GET_ITEM(keys.ptr(), k));
            if (value == nullptr) {
                if (PyErr_Occurred()) throw py::error_already_set();
                value = Py_None;
            }
            if (!is_item(values, count * i + k, value)) return false;
        }
        ++i;
    }
    return i == static_cast<std::size_t>(PyList_GET_SIZE(entries.ptr()));
}

}  // namespace

void register_param_lists(py::module_& module) {
    py::class_<TensorList>(module, "TensorList")
        .def(py::init(&make_tensor_list))
        .def_property(
            "filled", [](py::handle self) { return self_of(self).filled; },
            [](py::handle self, py::handle value) {
                self_of(self).filled = truth("filled", value);
            })
        .def("__len__", [](const py::args& args) { return self_of(args, 1).size(); })
        .def("__iter__", [](const py::args& args) { return py::iter(self_of(args, 1).tensors()); })
        .def("__getitem__",
             [](const py::args& args) { return self_of(args, 2).get(py::object(args[1])); });
    define(module, "gradients", "params",
           "The parameters' gradients (`p.grad`), and how many of them are None.", &gradients);
    define(module, "clear_gradients", "params", "Set `p.grad = None` on every parameter.",
           &clear_gradients);
    define(module, "same_objects", "a b",
           "Whether two lists hold the same objects in the same order.", &same_objects);
    define(module, "same_entries", "state entries keys values",
           "Whether the values of `state` but the empty ones are `entries`, and hold `values` at "
           "`keys`.\n\n`values` has an item for every entry and key, None where there is none.",
           &same_entries);
}

}  // namespace eigenfilter
