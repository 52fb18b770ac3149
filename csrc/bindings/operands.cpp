#include "operands.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "reader.hpp"

namespace eigenfilter {
namespace {

using std::int64_t;
using std::size_t;

PyObject* layout_error = nullptr;

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

std::string joined(const int64_t* values, size_t n) {
    std::string text;
    for (size_t i = 0; i < n; ++i) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
    return text;
}

std::string describe_layout(const dlpack::Tensor& t) {
    return "shape (" + joined(t.shape, t.ndim) + ") and strides (" + joined(t.strides, t.ndim) +
           ")";
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

// Whether the elements fill one stretch of memory, in the order of the dimensions.
bool is_contiguous(const dlpack::Tensor& t) {
    int64_t expected = 1;
    for (int d = t.ndim - 1; d >= 0; --d) {
        if (t.shape[d] == 1) continue;
        if (t.strides[d] != expected) return count(t) == 0;
        expected *= t.shape[d];
    }
    return true;
}

// The same, in some order of the dimensions.
bool is_dense(const dlpack::Tensor& t) {
    std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
    for (int i = 0; i < t.ndim; ++i) {
        if (t.shape[i] == 0) return true;
        if (t.shape[i] != 1) dims.emplace_back(t.strides[i], t.shape[i]);
    }
    std::sort(dims.begin(), dims.end());
    int64_t expected = 1;
    for (const auto& [stride, size] : dims) {
        if (stride != expected) return false;
        expected *= size;
    }
    return true;
}

// The first of `count` roles that holds gradients, whose dtypes others follow; or nullptr.
const Role* first_gradients(const Role* roles, size_t count) {
    const auto* const end = roles + count;
    const auto* const place =
        std::find_if(roles, end, [](const Role& role) { return role.gradients(); });
    return place != end ? place : nullptr;
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

std::string describe(const Shape& shape) { return "[" + joined(shape.data(), shape.size()) + "]"; }

TensorList::TensorList(py::handle tensors, bool hold, bool trust)
    : tensors_(py::reinterpret_steal<py::tuple>(PySequence_Tuple(tensors.ptr()))) {
    if (!tensors_) throw py::error_already_set();
    if (trust) known_ = std::make_shared<std::vector<void*>>(size(), nullptr);
    if (!hold) return;
    Reader reader;
    std::vector<py::object> held;
    for (size_t i = 0; i < size(); ++i) {
        PyObject* object = PyTuple_GET_ITEM(tensors_.ptr(), i);
        reader.read(object, [&] { return "tensors[" + std::to_string(i) + "]"; }, held);
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
TensorList& self_of(const py::args& args, const py::kwargs& named, std::size_t count) {
    if (args.size() != count || !named.empty())
        fail(PyExc_TypeError, "a method of TensorList takes " + std::to_string(count - 1) +
                                  " arguments by position, and was given others");
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

}  // namespace

void register_operands(py::module_& module) {
    layout_error = PyErr_NewException("eigenfilter._core.LayoutError", PyExc_ValueError, nullptr);
    module.attr("LayoutError") = py::handle(layout_error);
    py::class_<TensorList>(module, "TensorList")
        .def(py::init(&make_tensor_list))
        .def_property(
            "filled", [](py::handle self) { return self_of(self).filled; },
            [](py::handle self, py::handle value) {
                self_of(self).filled = truth("filled", value);
            })
        .def("__len__", [](const py::args& args,
                           const py::kwargs& named) { return self_of(args, named, 1).size(); })
        .def("__getitem__", [](const py::args& args, const py::kwargs& named) {
            return self_of(args, named, 2).get(py::object(args[1]));
        });
}

Operands::Operands(std::initializer_list<Role> roles) : Operands(roles.begin(), roles.size()) {}

Operands::Operands(const Role* roles, size_t count_of_roles)
    : roles_(roles, roles + count_of_roles), asked_others_(Reader::asked_others) {
    std::vector<dlpack::Tensor> first;
    for (size_t r = 0; r < count_of_roles; ++r) {
        if (!roles[r].list.is_none() || !roles[r].optional()) read_role(roles, r, first);
    }
    require_unchanged();
    check_overlap(roles, count_of_roles);
}

py::tuple Operands::items_of_role(const Role& role, std::shared_ptr<std::vector<void*>>& known) {
    if (role.traits & kOneTensor) return py::make_tuple(role.list);
    const TensorList* const list = tensor_list(role.list);
    if (list == nullptr) return items_of(role.name, role.list);
    known = list->known();
    return list->tensors();
}

void Operands::read_role(const Role* roles, size_t r, std::vector<dlpack::Tensor>& first) {
    const Role& role = roles[r];
    std::shared_ptr<std::vector<void*>> known_memory;
    const py::tuple items = items_of_role(role, known_memory);
    const size_t n = items.size();
    items_[r] = items;
    if (r == 0) {
        if (n == 0) fail(PyExc_ValueError, std::string(role.name) + " is empty");
        first.reserve(n);
        numel_.resize(n);
    } else if (n != size()) {
        fail(PyExc_ValueError, std::string(role.name) + " has " + std::to_string(n) +
                                   " tensors and " + roles[0].name + " has " +
                                   std::to_string(size()) + ": pass lists of equal length");
    }
    data_[r].reserve(n);
    Reader reader;
    for (size_t i = 0; i < n; ++i) {
        const auto name = [&] { return role.at(i); };
        void** const known = known_memory ? known_memory->data() + i : nullptr;
        const dlpack::Tensor t =
            reader.read(PyTuple_GET_ITEM(items.ptr(), i), name, kept_, role.written(), known);
        if (reader.source() != PyTuple_GET_ITEM(items.ptr(), i))
            shards_.push_back({r, i, reader.source()});
        check_type(t, name, roles, r, i);
        if (r == 0) {
            if (i == 0) shape_.assign(t.shape, t.shape + t.ndim);
            const bool ordered = is_contiguous(t);
            is_contiguous_ &= ordered;
            if (!ordered && !is_dense(t))
                fail(PyExc_ValueError, name() + " is not dense (" + describe_layout(t) +
                                           "): pass .contiguous() of it");
            first.push_back(t);
            numel_[i] = count(t);
        } else if (!same_layout(t, first[i])) {
            const std::string model = roles[0].at(i);
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
        fail(PyExc_ValueError, name() + " is on " + describe(t.device) + " and " + roles[0].at(0) +
                                   " on " + describe(device_) + ": group tensors by device");
    if (!takes(dtype, roles, r, i)) {
        const Role* const model = first_gradients(roles, r);
        fail(layout_error,
             name() + " is " + describe(t.dtype) + " and " +
                 (model != nullptr && roles[r].gradients() ? model->at(i) : roles[0].at(0)) +
                 " is not: group tensors by dtype, or convert it with .to()");
    }
    if (reinterpret_cast<std::uintptr_t>(t.data) % size_of(dtype) != 0)
        fail(PyExc_ValueError, name() + " is not aligned to its element size: clone it");
}

bool Operands::takes(DType dtype, const Role* roles, size_t r, size_t i) {
    if (dtype == expected(roles[r], i)) return true;
    if (!roles[r].gradients() || first_gradients(roles, r) != nullptr) return false;
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
        any_written |= roles[r].written();
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
    const auto name = [&](const Stretch& s) { return roles[s.role].at(s.tensor); };
    const Stretch *furthest = nullptr, *furthest_written = nullptr;
    for (const Stretch& s : all) {
        const bool written = roles[s.role].written();
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

void Operands::require_same(const std::string& name, PyObject* source, const void* memory) const {
    dlpack::Tensor t;
    if (api_->tensor_from_py_object(source, &t) != 0)
        PyErr_Clear();
    else if (static_cast<char*>(t.data) + t.byte_offset == memory)
        return;
    fail(PyExc_RuntimeError,
         name +
             " changed while the arguments were read, by code of a number's or tensor's class: "
             "pass plain numbers and tensors");
}

void Operands::require_unchanged() {
    const std::uint64_t asked_others = Reader::asked_others;
    if (asked_others == asked_others_) return;
    auto shard = shards_.begin();
    for (size_t r = 0; r < roles_.size(); ++r) {
        for (size_t i = 0; i < data_[r].size(); ++i) {
            PyObject* source = PyTuple_GET_ITEM(items_[r].ptr(), i);
            if (shard != shards_.end() && shard->role == r && shard->index == i)
                source = (shard++)->source;
            require_same(roles_[r].at(i), source, data_[r][i]);
        }
    }
    for (const Single& s : singles_) {
        if (s.source != nullptr)
            require_same(s.name, s.source, reinterpret_cast<const void*>(s.begin));
    }
    asked_others_ = asked_others;
}

void Operands::keep_apart(const char* name, const void* memory, int64_t bytes, bool written,
                          PyObject* source) {
    const auto first = reinterpret_cast<std::uintptr_t>(memory);
    Single single{name, first, first + static_cast<std::uintptr_t>(bytes), written, source};
    const auto share = [&](std::uintptr_t begin, std::uintptr_t end) {
        return single.begin < end && begin < single.end;
    };
    const auto refuse = [&](const std::string& other) {
        fail(PyExc_ValueError, single.name + " and " + other +
                                   " share memory, and at least one of them is written: clone one "
                                   "of them");
    };
    for (size_t r = 0; r < roles_.size(); ++r) {
        if (!single.written && !roles_[r].written()) continue;
        for (size_t i = 0; i < data_[r].size(); ++i) {
            const auto begin = reinterpret_cast<std::uintptr_t>(data_[r][i]);
            if (share(begin, begin + static_cast<std::uintptr_t>(numel_[i]) *
                                         size_of(expected(roles_[r], i))))
                refuse(roles_[r].at(i));
        }
    }
    for (const Single& other : singles_) {
        if ((single.written || other.written) && share(other.begin, other.end)) refuse(other.name);
    }
    singles_.push_back(std::move(single));
}

const Range kFinite{[](double v) { return std::isfinite(v); }, "finite"};
const Range kComputed{kFinite.holds, "finite", true};
const Range kNotZero{[](double v) { return std::isfinite(v) && v != 0; }, "finite and not 0", true};
const Range kFraction{[](double v) { return v >= 0 && v < 1; }, "at least 0 and less than 1"};
const Range kNotNegative{[](double v) { return v >= 0 && std::isfinite(v); },
                         "at least 0 and finite"};
const Range kCount{[](double v) { return v >= 1 && v <= 9007199254740992 && v == std::floor(v); },
                   "a whole number from 1 to 2**53"};
const Range kSeed{[](double v) { return v >= 0 && v < 16777216 && v == std::floor(v); },
                  "a whole number from 0 to 2**24 - 1"};
const Range kPositive{[](double v) { return v > 0 && std::isfinite(v); }, "positive and finite"};

namespace {

void require(const char* name, double value, const Range& range) {
    if (!range.holds(value))
        fail(PyExc_ValueError, std::string(name) + " must be " + range.text + ", and is " +
                                   std::string(py::str(py::float_(value))));
}

// A Python number, which is no complex one, as a double.
double number_of(const char* name, py::handle value) {
    if (PyComplex_Check(value.ptr()) || type_name(value).find("complex") != std::string::npos)
        fail(PyExc_TypeError,
             std::string(name) + " must be a real number, not " + type_name(value));
    if (!PyFloat_CheckExact(value.ptr()) && !PyLong_CheckExact(value.ptr())) ++Reader::asked_others;
    const double number = PyFloat_AsDouble(value.ptr());
    if (number != -1 || !PyErr_Occurred()) return number;
    if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
        PyErr_Clear();
        fail(PyExc_ValueError,
             std::string(name) + " is beyond the largest float: pass a finite number");
    }
    if (!PyErr_ExceptionMatches(PyExc_TypeError) && !PyErr_ExceptionMatches(PyExc_ValueError))
        throw py::error_already_set();
    PyErr_Clear();
    fail(PyExc_TypeError, std::string(name) + " must be a number or a one-element tensor, and is " +
                              (value.is_none() ? "None" : "a " + type_name(value)));
}

}  // namespace

bool is_tensor(py::handle value) {
    return py::hasattr(py::type::of(value), "__dlpack_c_exchange_api__");
}

Scalar Operands::scalar(const char* name, py::handle value, const Range& range) {
    Scalar s;
    if (!is_tensor(value)) {
        s.value = number_of(name, value);
        require(name, s.value, range);
        require_unchanged();
        return s;
    }
    const auto named = [&] { return std::string(name); };
    Reader reader;
    const dlpack::Tensor t = reader.read(value.ptr(), named, kept_);
    kept_.push_back(py::reinterpret_borrow<py::object>(value));
    DType dtype;
    if (count(t) != 1 || !dtype_of(t.dtype, dtype) || size_of(dtype) < 4)
        fail(PyExc_TypeError,
             std::string(name) + " must be a number or a one-element float32 or float64 tensor");
    if (reinterpret_cast<std::uintptr_t>(t.data) % size_of(dtype) != 0)
        fail(PyExc_ValueError, named() + " is not aligned to its element size: clone it");
    keep_apart(name, t.data, size_of(dtype), false, reader.source());
    require_unchanged();
    if (t.device.type == dlpack::kCPU) {
        s.value = dtype == DType::f64 ? *static_cast<const double*>(t.data)
                                      : *static_cast<const float*>(t.data);
        if (!range.computed) require(name, s.value, range);
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

float* Operands::flag(const char* name, py::handle value, bool written) {
    if (value.is_none()) return nullptr;
    return static_cast<float*>(single(name, value, {1}, 32, written));
}

void* Operands::single(const char* name, py::handle value, const Shape& shape, int bits,
                       bool written) {
    const auto named = [&] { return std::string(name); };
    Reader reader;
    const dlpack::Tensor t = reader.read(value.ptr(), named, kept_, written);
    kept_.push_back(py::reinterpret_borrow<py::object>(value));
    const bool is_one = shape == Shape{1};
    if ((is_one ? count(t) != 1 : Shape(t.shape, t.shape + t.ndim) != shape) ||
        t.dtype.code != dlpack::kFloat || t.dtype.bits != bits || t.dtype.lanes != 1 ||
        !is_contiguous(t) || t.device.type != device_.type || t.device.id != device_.id ||
        reinterpret_cast<std::uintptr_t>(t.data) % (bits / 8) != 0)
        fail(PyExc_ValueError,
             named() + (is_one ? " must be a dense float" : " must be a contiguous float") +
                 std::to_string(bits) + " tensor of " +
                 (is_one ? "1 element" : "shape " + describe(shape)) + " on " + describe(device_));
    keep_apart(name, t.data, count(t) * (bits / 8), written, reader.source());
    require_unchanged();
    return t.data;
}

double* Operands::workspace(std::int64_t size) {
    const auto torch = py::module_::import("torch");
    const py::object device = py::object(items_[0][0]).attr("device");
    const py::object memory = torch.attr("empty")(size, py::arg("dtype") = torch.attr("float64"),
                                                  py::arg("device") = device);
    return static_cast<double*>(single("workspace", memory, {size}, 64, true));
}

void Operands::require_contiguous() const {
    if (!is_contiguous_)
        fail(PyExc_ValueError, roles_[0].at(0) + " must be contiguous: pass .contiguous() of it");
}

void Operands::require_vectors() const {
    require_contiguous();
    if (dtype_ != DType::f32 && dtype_ != DType::f64)
        fail(PyExc_TypeError, roles_[0].at(0) + " must be float32 or float64, not " +
                                  (dtype_ == DType::bf16 ? "bfloat16" : "float16"));
}

}  // namespace eigenfilter
