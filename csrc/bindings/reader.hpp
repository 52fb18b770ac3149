// Reads single tensors from Python; included by operands.cpp alone.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "dlpack.hpp"

namespace eigenfilter {
namespace {

namespace py = pybind11;

[[noreturn]] void fail(PyObject* kind, const std::string& message) {
    PyErr_SetString(kind, message.c_str());
    throw py::error_already_set();
}

std::int64_t count(const dlpack::Tensor& t) {
    std::int64_t n = 1;
    for (int i = 0; i < t.ndim; ++i) n *= t.shape[i];
    return n;
}

// Borrows tensors; remembers the exchange API of the last type it saw.
class Reader {
 public:
    // `what` names the tensor in messages; memory at `known` was found sound before.
    template <class Name>
    dlpack::Tensor read(PyObject* object, const Name& what, const void* known = nullptr) {
        dlpack::Tensor t;
        py::object local;
        if (Py_TYPE(object) == sharded_type_) {
            local = shard_of(object);
            object = local.ptr();
        }
        const bool borrowed = borrow(object, t);
        if (!borrowed || is_hollow(t)) {
            const std::string reason = borrowed ? "" : first_line_of_error();
            local = shard_of(object);
            if (!local || !borrow(local.ptr(), t) || is_hollow(t)) {
                PyErr_Clear();
                fail(PyExc_TypeError,
                     borrowed ? what() +
                                    " has no memory of its own (a fake, wrapped or freed tensor): "
                                    "pass the tensor that holds the data"
                              : what() + " cannot be used: " + reason +
                                    "; pass strided tensors with memory of their own");
            }
            sharded_type_ = Py_TYPE(object);
            object = local.ptr();
        }
        t.data = static_cast<char*>(t.data) + t.byte_offset;
        if (t.data != nullptr && t.data == known) return t;
        if (is_negated(object))
            fail(PyExc_TypeError, what() + " is lazily negated: pass .resolve_neg() of it");
        return t;
    }

    const dlpack::ExchangeApi* api() const { return api_; }

 private:
    bool borrow(PyObject* object, dlpack::Tensor& out) {
        if (Py_TYPE(object) != type_) {
            static PyObject* const attribute =
                PyUnicode_InternFromString("__dlpack_c_exchange_api__");
            const auto capsule = py::reinterpret_steal<py::object>(
                PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(object)), attribute));
            if (!capsule) {
                PyErr_Format(PyExc_TypeError, "%s is not a tensor of torch >= 2.11",
                             Py_TYPE(object)->tp_name);
                return false;
            }
            auto* header = static_cast<dlpack::ExchangeHeader*>(
                PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
            while (header != nullptr && header->major != 1) header = header->previous;
            if (header == nullptr) {
                PyErr_Clear();
                PyErr_SetString(PyExc_TypeError, "its DLPack exchange API is not of version 1");
                return false;
            }
            api_ = reinterpret_cast<const dlpack::ExchangeApi*>(header);
            type_ = Py_TYPE(object);
        }
        return api_->tensor_from_py_object(object, &out) == 0;
    }

    // torch's is_neg, called as the C function that it is unless a subclass brings its own.
    bool is_negated(PyObject* object) {
        static PyObject* const name = PyUnicode_InternFromString("is_neg");
        if (Py_TYPE(object) != negated_type_) {
            negated_type_ = Py_TYPE(object);
            method_ = py::reinterpret_steal<py::object>(
                PyObject_GetAttr(reinterpret_cast<PyObject*>(negated_type_), name));
            if (!method_) throw py::error_already_set();
            const auto* descriptor = reinterpret_cast<PyMethodDescrObject*>(method_.ptr());
            const bool plain = Py_IS_TYPE(method_.ptr(), &PyMethodDescr_Type) &&
                               descriptor->d_method->ml_flags == METH_NOARGS;
            function_ = plain ? descriptor->d_method->ml_meth : nullptr;
        }
        const auto answer = py::reinterpret_steal<py::object>(
            function_ != nullptr ? function_(object, nullptr)
                                 : PyObject_CallOneArg(method_.ptr(), object));
        if (!answer) throw py::error_already_set();
        return answer.ptr() == Py_True;
    }

    // Takes the Python error that is set; torch's go on with frames.
    static std::string first_line_of_error() {
        const std::string text = py::str(py::error_already_set().value());
        return text.substr(0, text.find('\n'));
    }

    static bool is_hollow(const dlpack::Tensor& t) { return t.data == nullptr && count(t) > 0; }

    // A DTensor's local shard, which the DTensor keeps alive; null for what has none.
    static py::object shard_of(PyObject* object) {
        static PyObject* const attribute = PyUnicode_InternFromString("_local_tensor");
        PyObject* shard = PyObject_GetAttr(object, attribute);
        if (shard == nullptr) PyErr_Clear();
        return py::reinterpret_steal<py::object>(shard);
    }

    PyTypeObject* type_ = nullptr;          // of the last tensor borrowed
    PyTypeObject* sharded_type_ = nullptr;  // of the last tensor that went by its shard
    const dlpack::ExchangeApi* api_ = nullptr;
    PyTypeObject* negated_type_ = nullptr;  // of the last tensor asked for its negation, with
    py::object method_;                     // the method that answers
    PyCFunction function_ = nullptr;
};

}  // namespace
}  // namespace eigenfilter
