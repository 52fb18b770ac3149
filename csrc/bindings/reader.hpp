// Single tensors from Python: where their memory lies, borrowed through DLPack.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "exchange.hpp"

namespace eigenfilter {

// How many elements a tensor has.
std::int64_t count(const dlpack::Tensor& t);

// A tensor's name in messages: an argument's, with its index in a list.
struct Name {
    const char* argument;
    Py_ssize_t index = -1;
    std::string operator()() const {
        return index < 0 ? argument : std::string(argument) + "[" + std::to_string(index) + "]";
    }
};

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
    void find(PyTypeObject* type);

    PyObject* name_;
    PyTypeObject* type_ = nullptr;  // of the last tensor asked, with
    py::object method_;             // the method that answers
    PyCFunction function_ = nullptr;
};

// Reads tensors; remembers the exchange API of the last type it saw.
class Reader {
 public:
    Reader();

    // How often Python code of someone else may have run, because something other than a tensor or
    // parameter of torch, or a plain number, was asked: it may have freed memory read before.
    static inline std::atomic<std::uint64_t> asked_others{0};

    // A local shard that is read in place of the object is kept in `held`. Memory at `*known` was
    // found sound before; it becomes what is sound now.
    dlpack::Tensor read(PyObject* object, const Name& name, std::vector<py::object>& held,
                        bool written = false, void** known = nullptr) {
        dlpack::Tensor t;
        py::object shard;
        if (Py_TYPE(object) == sharded_type_ && (shard = shard_of(object))) object = shard.ptr();
        const bool is_borrowed = borrow(object, t);
        if (!is_borrowed || (may_be_hollow(t) && is_hollow(object, t)))
            t = read_shard(object, shard, is_borrowed, name);
        t.data = static_cast<char*>(t.data) + t.byte_offset;
        source_ = object;
        if (shard) held.push_back(std::move(shard));
        if (known != nullptr && t.data != nullptr && t.data == *known) return t;
        if (is_negated_.ask(object))
            fail(PyExc_TypeError, name() + " is lazily negated: pass .resolve_neg() of it");
        if (written || known != nullptr) check_inference(object, name, written, known, t.data);
        return t;
    }

    const dlpack::ExchangeApi* api() const { return api_; }
    // Whose memory was read last: the object that was given, or its local shard.
    PyObject* source() const { return source_; }

 private:
    bool borrow(PyObject* object, dlpack::Tensor& out) {
        if (Py_TYPE(object) != type_ && !find_api(Py_TYPE(object))) return false;
        if (is_other_) ++asked_others;
        return api_->tensor_from_py_object(object, &out) == 0;
    }
    bool find_api(PyTypeObject* type);
    // No storage reaches as far as this, and memory seldom lies before: only there is a tensor
    // asked whether it has memory.
    static bool may_be_hollow(const dlpack::Tensor& t) {
        return reinterpret_cast<std::uintptr_t>(t.data) < std::uintptr_t{1} << 40;
    }
    static bool is_hollow(PyObject* object, const dlpack::Tensor& t);
    // A DTensor's local shard, which the DTensor keeps alive; null for what has none.
    static py::object shard_of(PyObject* object);
    void check_inference(PyObject* object, const Name& name, bool written, void** known,
                         void* data);
    // The memory of an object's local shard; that of the object itself is missing.
    dlpack::Tensor read_shard(PyObject*& object, py::object& shard, bool is_borrowed,
                              const Name& name);

    PyTypeObject* type_ = nullptr;          // of the last tensor borrowed
    bool is_other_ = false;                 // whether it brings code of its own
    PyTypeObject* sharded_type_ = nullptr;  // of the last tensor that went by its shard
    const dlpack::ExchangeApi* api_ = nullptr;
    PyObject* source_ = nullptr;
    Question is_negated_, is_inference_;
};

}  // namespace eigenfilter
