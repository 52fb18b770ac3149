#include "reader.hpp"

#include <utility>

namespace eigenfilter {
namespace {

const PyTypeObject* torch_type(const char* module, const char* name) {
    py::object type = py::module_::import(module).attr(name);
    return reinterpret_cast<PyTypeObject*>(type.release().ptr());
}

// Whether a type is torch's own, whose methods are no Python code.
bool is_plain(const PyTypeObject* type) {
    static const auto* const tensor = torch_type("torch", "Tensor");
    static const auto* const parameter = torch_type("torch.nn", "Parameter");
    return type == tensor || type == parameter;
}

struct MethodNames {
    PyObject* neg = PyUnicode_InternFromString("is_neg");
    PyObject* inference = PyUnicode_InternFromString("is_inference");
};
const MethodNames& method_names() {
    static const MethodNames interned;
    return interned;
}

// Takes the Python error that is set; torch's go on with frames.
std::string first_line_of_error() {
    const std::string text = py::str(py::error_already_set().value());
    return text.substr(0, text.find('\n'));
}

}  // namespace

std::int64_t count(const dlpack::Tensor& t) {
    std::int64_t n = 1;
    for (int i = 0; i < t.ndim; ++i) n *= t.shape[i];
    return n;
}

Reader::Reader() : is_negated_(method_names().neg), is_inference_(method_names().inference) {}

void Question::find(PyTypeObject* type) {
    method_ = py::reinterpret_steal<py::object>(
        PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name_));
    if (!method_) fail(PyExc_TypeError, std::string(type->tp_name) + " is not a tensor of torch");
    type_ = type;
    function_ = nullptr;
    if (!Py_IS_TYPE(method_.ptr(), &PyMethodDescr_Type)) return;
    const auto* descriptor = reinterpret_cast<PyMethodDescrObject*>(method_.ptr());
    // Another class may have borrowed the method: only its own kind may be passed to it.
    if (descriptor->d_method->ml_flags == METH_NOARGS &&
        PyType_IsSubtype(type, descriptor->d_common.d_type))
        function_ = descriptor->d_method->ml_meth;
}

void Reader::check_inference(PyObject* object, const Name& name, bool written, void** known,
                             void* data) {
    const bool is_inference = is_inference_.ask(object);
    if (written && is_inference &&
        !py::module_::import("torch").attr("is_inference_mode_enabled")().cast<bool>())
        fail(PyExc_RuntimeError,
             name() +
                 " was made in inference mode, and can only be changed there: pass .clone() of "
                 "it, or call this within torch.inference_mode()");
    if (known != nullptr) *known = is_inference ? nullptr : data;  // it depends on the mode
}

// Whether a tensor has no memory: its address is then the bytes between the beginning of its
// storage and itself, of a view that begins further on as of a whole.
bool Reader::is_hollow(PyObject* object, const dlpack::Tensor& t) {
    if (count(t) == 0) return false;
    const auto offset =
        py::handle(object).attr("storage_offset")().cast<std::uintptr_t>() * t.dtype.bits / 8;
    return reinterpret_cast<std::uintptr_t>(t.data) == offset;
}

py::object Reader::shard_of(PyObject* object) {
    static PyObject* const attribute = PyUnicode_InternFromString("_local_tensor");
    ++asked_others;
    PyObject* shard = PyObject_GetAttr(object, attribute);
    if (shard == nullptr) PyErr_Clear();
    return py::reinterpret_steal<py::object>(shard);
}

dlpack::Tensor Reader::read_shard(PyObject*& object, py::object& shard, bool is_borrowed,
                                  const Name& name) {
    const std::string reason = is_borrowed ? "" : first_line_of_error();
    PyTypeObject* const type = Py_TYPE(object);
    dlpack::Tensor t;
    shard = shard_of(object);
    if (!shard || !borrow(shard.ptr(), t) || (may_be_hollow(t) && is_hollow(shard.ptr(), t))) {
        PyErr_Clear();
        fail(PyExc_TypeError,
             is_borrowed ? name() +
                               " has no memory of its own (a fake, wrapped or freed tensor): pass "
                               "the tensor that holds the data"
                         : name() + " cannot be used: " + reason +
                               "; pass strided tensors with memory of their own");
    }
    sharded_type_ = type;
    object = shard.ptr();
    return t;
}

bool Reader::find_api(PyTypeObject* type) {
    static PyObject* const attribute = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
    const auto capsule = py::reinterpret_steal<py::object>(
        PyObject_GetAttr(reinterpret_cast<PyObject*>(type), attribute));
    if (!capsule) {
        PyErr_Format(PyExc_TypeError, "%s is not a tensor of torch >= 2.11", type->tp_name);
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
    type_ = type;
    is_other_ = !is_plain(type);
    return true;
}

}  // namespace eigenfilter
