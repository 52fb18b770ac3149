// Reads single tensors from Python; included by operands.cpp alone.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "dlpack.hpp"
#include "exchange.hpp"

namespace eigenfilter {
namespace {

std::int64_t count(const dlpack::Tensor& t) {
    std::int64_t n = 1;
    for (int i = 0; i < t.ndim; ++i) n *= t.shape[i];
    return n;
}

// A question to tensors that is answered by a method without arguments, called as the C function
// that it is unless a subclass brings its own.
class Question {
 public:
    explicit Question(PyObject* method_name) : name_(method_name) {}

    bool ask(PyObject* object) {
        if (Py_TYPE(object) != type_) find(Py_TYPE(object));
        const auto answer = py::reinterpret_steal<py::object>(
            function_ != nullptr ? function_(object, nullptr)
                                 : PyObject_CallOneArg(method_.ptr(), object));
        if (!answer) throw py::error_already_set();
        return answer.ptr() == Py_True;
    }

 private:
    void find(PyTypeObject* type) {
        method_ = py::reinterpret_steal<py::object>(
            PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name_));
        if (!method_)
            fail(PyExc_TypeError, std::string(type->tp_name) + " is not a tensor of torch");
        type_ = type;
        function_ = nullptr;
        if (!Py_IS_TYPE(method_.ptr(), &PyMethodDescr_Type)) return;
        const auto* descriptor = reinterpret_cast<PyMethodDescrObject*>(method_.ptr());
        // Another class may have borrowed the method: only its own kind may be passed to it.
        if (descriptor->d_method->ml_flags == METH_NOARGS &&
            PyType_IsSubtype(type, descriptor->d_common.d_type))
            function_ = descriptor->d_method->ml_meth;
    }

    PyObject* name_;
    PyTypeObject* type_ = nullptr;  // of the last tensor asked, with
    py::object method_;             // the method that answers
    PyCFunction function_ = nullptr;
};

// Borrows tensors; remembers the exchange API of the last type it saw.
class Reader {
 public:
    // How often Python code of someone else may have run, because something other than a tensor or
    // parameter of torch, or a plain number, was asked: it may have freed memory read before.
    static inline std::atomic<std::uint64_t> asked_others{0};

    // `what` names the tensor in messages; a local shard that is read in place of the object is
    // kept in `kept`. Memory at `*known` was found sound before; it becomes what is sound now.
    template <class Name>
    dlpack::Tensor read(PyObject* object, const Name& what, std::vector<py::object>& held,
                        bool written = false, void** known = nullptr) {
        dlpack::Tensor t;
        py::object local;
        if (Py_TYPE(object) == sharded_type_ && (local = shard_of(object))) object = local.ptr();
        const bool borrowed = borrow(object, t);
        if (!borrowed || is_hollow(object, t)) {
            const std::string reason = borrowed ? "" : first_line_of_error();
            PyTypeObject* const type = Py_TYPE(object);
            local = shard_of(object);
            if (!local || !borrow(local.ptr(), t) || is_hollow(local.ptr(), t)) {
                PyErr_Clear();
                fail(PyExc_TypeError,
                     borrowed ? what() +
                                    " has no memory of its own (a fake, wrapped or freed tensor): "
                                    "pass the tensor that holds the data"
                              : what() + " cannot be used: " + reason +
                                    "; pass strided tensors with memory of their own");
            }
            sharded_type_ = type;
            object = local.ptr();
        }
        t.data = static_cast<char*>(t.data) + t.byte_offset;
        source_ = object;
        if (local) held.push_back(std::move(local));
        if (known != nullptr && t.data != nullptr && t.data == *known) return t;
        if (is_negated_.ask(object))
            fail(PyExc_TypeError, what() + " is lazily negated: pass .resolve_neg() of it");
        const bool is_asked = written || known != nullptr;
        const bool is_inference = is_asked && is_inference_.ask(object);
        if (written && is_inference && !is_inference_mode())
            fail(PyExc_RuntimeError,
                 what() +
                     " was made in inference mode, and can only be changed there: pass "
                     ".clone() of it, or call this within torch.inference_mode()");
        if (known != nullptr) *known = is_inference ? nullptr : t.data;  // it depends on the mode
        return t;
    }

    const dlpack::ExchangeApi* api() const { return api_; }
    // Whose memory was read last: the object that was given, or its local shard.
    PyObject* source() const { return source_; }

 private:
    static bool is_plain(const PyTypeObject* type) {
        static const auto* const tensor = torch_type("torch", "Tensor");
        static const auto* const parameter = torch_type("torch.nn", "Parameter");
        return type == tensor || type == parameter;
    }
    static const PyTypeObject* torch_type(const char* module, const char* name) {
        py::object type = py::module_::import(module).attr(name);
        return reinterpret_cast<PyTypeObject*>(type.release().ptr());
    }

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
            api_ = exchange_api(reinterpret_cast<const dlpack::ExchangeApi*>(header));
            type_ = Py_TYPE(object);
            is_other_ = !is_plain(type_);
        }
        if (is_other_) ++asked_others;
        return api_->tensor_from_py_object(object, &out) == 0;
    }

    // No storage reaches this far, and memory seldom lies before: only there is a tensor asked.
    static constexpr std::uintptr_t kFarthest = std::uintptr_t{1} << 40;

    struct Names {
        PyObject* neg = PyUnicode_InternFromString("is_neg");
        PyObject* inference = PyUnicode_InternFromString("is_inference");
    };
    static const Names& names() {
        static const Names interned;
        return interned;
    }

    static bool is_inference_mode() {
        return py::module_::import("torch").attr("is_inference_mode_enabled")().cast<bool>();
    }

    // Takes the Python error that is set; torch's go on with frames.
    static std::string first_line_of_error() {
        const std::string text = py::str(py::error_already_set().value());
        return text.substr(0, text.find('\n'));
    }

    // Whether a tensor has no memory: its address is then the bytes between the beginning of its
    // storage and itself, of a view that begins further on as of a whole.
    static bool is_hollow(PyObject* object, const dlpack::Tensor& t) {
        const auto address = reinterpret_cast<std::uintptr_t>(t.data);
        if (address >= kFarthest || count(t) == 0) return false;
        const auto offset =
            py::handle(object).attr("storage_offset")().cast<std::uintptr_t>() * t.dtype.bits / 8;
        return address == offset;
    }

    // A DTensor's local shard, which the DTensor keeps alive; null for what has none.
    static py::object shard_of(PyObject* object) {
        static PyObject* const attribute = PyUnicode_InternFromString("_local_tensor");
        ++asked_others;
        PyObject* shard = PyObject_GetAttr(object, attribute);
        if (shard == nullptr) PyErr_Clear();
        return py::reinterpret_steal<py::object>(shard);
    }

    PyTypeObject* type_ = nullptr;          // of the last tensor borrowed
    bool is_other_ = false;                 // whether it brings code of its own
    PyTypeObject* sharded_type_ = nullptr;  // of the last tensor that went by its shard
    const dlpack::ExchangeApi* api_ = nullptr;
    PyObject* source_ = nullptr;
    Question is_negated_{names().neg}, is_inference_{names().inference};
};

}  // namespace
}  // namespace eigenfilter
