#include "operands.hpp"

#include <algorithm>
#include <string>

#include "reader.hpp"

namespace eigenfilter {
namespace {

using std::int64_t;
using std::size_t;

PyObject* layout_error = nullptr;

std::string at(const char* name, size_t i) {
    return std::string(name) + "[" + std::to_string(i) + "]";
}

std::string describe(const dlpack::DataType& t) {
    if (t.code == dlpack::kBfloat) return "bfloat" + std::to_string(t.bits);
    if (t.code == dlpack::kFloat) return "float" + std::to_string(t.bits);
    static const char* kinds[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
    return (t.code < 7 ? kinds[t.code] : "low-precision float") + std::to_string(t.bits);
}

std::string describe(const dlpack::Device& d) {
    const char* name = d.type == dlpack::kCPU    ? "cpu"
                       : d.type == dlpack::kCUDA ? "cuda"
                       : d.type == dlpack::kROCM ? "rocm"
                                                 : "device type ";
    return name + (d.type == dlpack::kCPU ? std::string() : ":" + std::to_string(d.id));
}

std::string describe(const int64_t* values, int n) {
    std::string text = "(";
    for (int i = 0; i < n; ++i) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
    return text + ")";
}

std::string describe_layout(const dlpack::Tensor& t) {
    return "shape " + describe(t.shape, t.ndim) + " and strides " + describe(t.strides, t.ndim);
}

bool dtype_of(const dlpack::DataType& t, DType& out) {
    if (t.lanes != 1) return false;
    if (t.code == dlpack::kFloat && t.bits == 32)
        out = DType::f32;
    else if (t.code == dlpack::kFloat && t.bits == 64)
        out = DType::f64;
    else if (t.code == dlpack::kFloat && t.bits == 16)
        out = DType::f16;
    else if (t.code == dlpack::kBfloat && t.bits == 16)
        out = DType::bf16;
    else
        return false;
    return true;
}

// Whether the elements fill one stretch of memory, in some order of the dimensions.
bool is_dense(const dlpack::Tensor& t) {
    int64_t expected = 1;
    int d = t.ndim - 1;
    for (; d >= 0; --d) {
        if (t.shape[d] == 1) continue;
        if (t.strides[d] != expected) break;
        expected *= t.shape[d];
    }
    if (d < 0) return true;
    std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
    for (int i = 0; i < t.ndim; ++i) {
        if (t.shape[i] == 0) return true;
        if (t.shape[i] != 1) dims.emplace_back(t.strides[i], t.shape[i]);
    }
    std::sort(dims.begin(), dims.end());
    expected = 1;
    for (const auto& [stride, size] : dims) {
        if (stride != expected) return false;
        expected *= size;
    }
    return true;
}

// The first of `count` roles that holds gradients, whose dtypes others follow; or nullptr.
const Role* first_gradients(const Role* roles, size_t count) {
    const auto* const end = roles + count;
    const auto* const found =
        std::find_if(roles, end, [](const Role& role) { return role.gradients; });
    return found != end ? found : nullptr;
}

bool same_layout(const dlpack::Tensor& a, const dlpack::Tensor& b) {
    if (a.ndim != b.ndim) return false;
    for (int i = 0; i < a.ndim; ++i) {
        if (a.shape[i] != b.shape[i]) return false;
        if (a.shape[i] > 1 && a.strides[i] != b.strides[i]) return false;
    }
    return true;
}

}  // namespace

TensorList::TensorList(const py::iterable& tensors, bool hold)
    : tensors_(py::reinterpret_steal<py::list>(PySequence_List(tensors.ptr()))) {
    if (!tensors_) throw py::error_already_set();
    known_.assign(size(), nullptr);
    if (!hold) return;
    Reader reader;
    for (size_t i = 0; i < size(); ++i) {
        PyObject* object = PyList_GET_ITEM(tensors_.ptr(), i);
        reader.read(object, [&] { return at("tensors", i); });
        dlpack::Managed* managed = nullptr;
        // What goes by a local shard is not held; the next error is its, and is of no interest.
        if (reader.api()->managed_tensor_from_py_object(object, &managed) == 0)
            held_.emplace_back(managed);
        else
            PyErr_Clear();
    }
}

py::object TensorList::get(Py_ssize_t i) const {
    const auto n = static_cast<Py_ssize_t>(size());
    if (i < -n || i >= n) throw py::index_error("no such tensor in this list");
    return py::reinterpret_borrow<py::object>(PyList_GET_ITEM(tensors_.ptr(), i < 0 ? i + n : i));
}

void register_operands(py::module_& module) {
    layout_error = PyErr_NewException("eigenfilter._core.LayoutError", PyExc_ValueError, nullptr);
    module.attr("LayoutError") = py::handle(layout_error);
    py::class_<TensorList>(module, "TensorList")
        .def(py::init<const py::iterable&, bool>(), py::arg("tensors"), py::arg("hold") = false)
        .def_readwrite("filled", &TensorList::filled)
        .def("__len__", &TensorList::size)
        .def("__getitem__", &TensorList::get);
}

Operands::Operands(std::initializer_list<Role> roles) : Operands(roles.begin(), roles.size()) {}

Operands::Operands(const Role* roles, size_t count_of_roles) {
    std::vector<dlpack::Tensor> first;
    for (size_t r = 0; r < count_of_roles; ++r) {
        if (!roles[r].list.is_none() || !roles[r].optional) read_role(roles, r, first);
    }
    check_overlap(roles, count_of_roles);
}

void Operands::read_role(const Role* roles, size_t r, std::vector<dlpack::Tensor>& first) {
    const char* const role = roles[r].name;
    py::handle list = roles[r].list;
    TensorList* reused = nullptr;
    if (py::isinstance<TensorList>(list)) {
        reused = list.cast<TensorList*>();
        list = reused->tensors();  // kept alive by `reused`
    } else if (!PyList_Check(list.ptr()) && !PyTuple_Check(list.ptr())) {
        fail(PyExc_TypeError, std::string(role) + " must be a list or tuple of tensors");
    }
    const auto n = static_cast<size_t>(PySequence_Fast_GET_SIZE(list.ptr()));
    PyObject** items = PySequence_Fast_ITEMS(list.ptr());
    if (r == 0) {
        if (n == 0) fail(PyExc_ValueError, std::string(role) + " is empty");
        first.reserve(n);
        numel_.resize(n);
    } else if (n != size()) {
        fail(PyExc_ValueError, std::string(role) + " has " + std::to_string(n) + " tensors and " +
                                   roles[0].name + " has " + std::to_string(size()) +
                                   ": pass lists of equal length");
    }
    data_[r].reserve(n);
    Reader reader;
    for (size_t i = 0; i < n; ++i) {
        const auto name = [&] { return at(role, i); };
        void* const known = reused != nullptr ? reused->known()[i] : nullptr;
        const dlpack::Tensor t = reader.read(items[i], name, known);
        if (reused != nullptr) reused->known()[i] = t.data;
        check_type(t, name, roles, r, i);
        if (r == 0) {
            if (!is_dense(t))
                fail(PyExc_ValueError, name() + " is not dense (" + describe_layout(t) +
                                           "): pass .contiguous() of it");
            first.push_back(t);
            numel_[i] = count(t);
        } else if (!same_layout(t, first[i])) {
            const std::string model = at(roles[0].name, i);
            fail(layout_error, name() + " has " + describe_layout(t) + ", " + model + " has " +
                                   describe_layout(first[i]) + ": pass torch.empty_like(" + model +
                                   ").copy_(" + name() + ")");
        }
        data_[r].push_back(t.data);
    }
    api_ = reader.api();
}

template <class Name>
void Operands::check_type(const dlpack::Tensor& t, const Name& name, const Role* roles, size_t r,
                          size_t i) {
    DType dtype;
    if (!dtype_of(t.dtype, dtype))
        fail(PyExc_TypeError, name() + " is " + describe(t.dtype) +
                                  ": supported are float32, float64, bfloat16, float16");
    if (r == 0 && i == 0) {
        dtype_ = dtype;
        device_ = t.device;
    }
    if (t.device.type != device_.type || t.device.id != device_.id)
        fail(PyExc_ValueError, name() + " is on " + describe(t.device) + " and " +
                                   at(roles[0].name, 0) + " on " + describe(device_) +
                                   ": group tensors by device");
    if (!takes(dtype, roles, r, i)) {
        const Role* const model = first_gradients(roles, r);
        fail(layout_error, name() + " is " + describe(t.dtype) + " and " +
                               (model != nullptr && roles[r].gradients ? at(model->name, i)
                                                                       : at(roles[0].name, 0)) +
                               " is not: group tensors by dtype, or convert it with .to()");
    }
    if (reinterpret_cast<std::uintptr_t>(t.data) % size_of(dtype) != 0)
        fail(PyExc_ValueError, name() + " is not aligned to its element size: clone it");
}

bool Operands::takes(DType dtype, const Role* roles, size_t r, size_t i) {
    if (dtype == expected(roles[r], i)) return true;
    if (!roles[r].gradients || first_gradients(roles, r) != nullptr) return false;
    if (r > 0 && dtype != wider(dtype_)) return false;
    if (wide_.empty()) wide_.assign(size(), dtype_);
    wide_[i] = dtype;
    return true;
}

void Operands::check_overlap(const Role* roles, size_t count_of_roles) const {
    struct Stretch {
        std::uintptr_t begin;
        std::uint32_t tensor, role;
    };
    std::vector<Stretch> all;
    all.reserve(size() * count_of_roles);
    bool any_written = false;
    for (std::uint32_t r = 0; r < count_of_roles; ++r) {
        any_written |= roles[r].written;
        for (std::uint32_t i = 0; i < data_[r].size(); ++i) {
            if (numel_[i] > 0) all.push_back({reinterpret_cast<std::uintptr_t>(data_[r][i]), i, r});
        }
    }
    if (!any_written) return;
    std::sort(all.begin(), all.end(),
              [](const Stretch& a, const Stretch& b) { return a.begin < b.begin; });
    // Of the stretches so far, the one that reaches furthest, among all and among the written.
    const auto end = [&](const Stretch& s) {
        return s.begin + static_cast<std::uintptr_t>(numel_[s.tensor]) *
                             size_of(expected(roles[s.role], s.tensor));
    };
    const auto name = [&](const Stretch& s) { return at(roles[s.role].name, s.tensor); };
    const Stretch *furthest = nullptr, *furthest_written = nullptr;
    for (const Stretch& s : all) {
        const bool written = roles[s.role].written;
        const Stretch* other = written ? furthest : furthest_written;
        if (other != nullptr && end(*other) > s.begin)
            fail(PyExc_ValueError, name(s) + " and " + name(*other) +
                                       " share memory, and at least one of them is written: "
                                       "clone one of them");
        if (furthest == nullptr || end(s) > end(*furthest)) furthest = &s;
        if (written && (furthest_written == nullptr || end(s) > end(*furthest_written)))
            furthest_written = &s;
    }
}

void* Operands::stream() const {
    void* stream = nullptr;
    if (api_->current_work_stream(device_.type, device_.id, &stream) != 0)
        throw py::error_already_set();
    return stream;
}

Scalar Operands::scalar(const char* name, py::handle value) const {
    Scalar s;
    if (!py::hasattr(py::type::of(value), "__dlpack_c_exchange_api__") &&
        py::hasattr(value, "__float__")) {
        s.value = PyFloat_AsDouble(value.ptr());
        if (s.value == -1 && PyErr_Occurred()) throw py::error_already_set();
        return s;
    }
    const dlpack::Tensor t = Reader().read(value.ptr(), [&] { return std::string(name); });
    DType dtype;
    if (count(t) != 1 || !dtype_of(t.dtype, dtype) || size_of(dtype) < 4)
        fail(PyExc_TypeError,
             std::string(name) + " must be a number or a one-element float32 or float64 tensor");
    if (t.device.type == dlpack::kCPU) {
        s.value = dtype == DType::f64 ? *static_cast<const double*>(t.data)
                                      : *static_cast<const float*>(t.data);
        return s;
    }
    if (t.device.type != device_.type || t.device.id != device_.id)
        fail(PyExc_ValueError, std::string(name) + " is on " + describe(t.device) +
                                   " and the tensors on " + describe(device_) +
                                   ": move it there or to the CPU");
    s.device = t.data;
    s.device_is_double = dtype == DType::f64;
    return s;
}

float* Operands::flag(const char* name, py::handle value) const {
    if (value.is_none()) return nullptr;
    return static_cast<float*>(output(name, value, 1, 32));
}

void* Operands::output(const char* name, py::handle value, int64_t numel, int bits) const {
    const dlpack::Tensor t = Reader().read(value.ptr(), [&] { return std::string(name); });
    if (count(t) != numel || t.dtype.code != dlpack::kFloat || t.dtype.bits != bits ||
        !is_dense(t) || t.device.type != device_.type || t.device.id != device_.id)
        fail(PyExc_ValueError, std::string(name) + " must be a dense float" + std::to_string(bits) +
                                   " tensor of " + std::to_string(numel) + " elements on " +
                                   describe(device_));
    return t.data;
}

}  // namespace eigenfilter
