#include "tensor_args.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "param_lists.hpp"
#include "reader.hpp"

namespace eigenfilter {
namespace {

using std::int64_t;
using std::size_t;

PyObject* layout_error = nullptr;
constexpr int kAnyBits = 0;  // 64, or else 32

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

// Whether the kernels have a dtype of floats, and which.
bool dtype_of(const dlpack::DataType& t, DType& out) {
    const bool is_float = t.code == dlpack::kFloat, is_half = t.bits == 16;
    out = is_half ? is_float ? DType::f16 : DType::bf16 : t.bits == 64 ? DType::f64 : DType::f32;
    return t.lanes == 1 && (is_float || (t.code == dlpack::kBfloat && is_half)) &&
           t.bits == 8 * size_of(out);
}

// Whether the kernels have a dtype of whole numbers, and which.
bool whole_dtype_of(const dlpack::DataType& t, DType& out) {
    out = t.code == dlpack::kUInt ? DType::u8 : t.bits == 16 ? DType::i16 : DType::i8;
    return t.lanes == 1 && t.bits == 8 * size_of(out) &&
           (t.code == dlpack::kInt || t.code == dlpack::kUInt);
}

DType require_dtype(const dlpack::Tensor& t, const Name& name) {
    DType dtype;
    if (!dtype_of(t.dtype, dtype))
        fail(PyExc_TypeError, name() + " is " + describe(t.dtype) +
                                  ": supported are float32, float64, bfloat16, float16");
    return dtype;
}

void require_aligned(const dlpack::Tensor& t, const Name& name) {
    if (reinterpret_cast<std::uintptr_t>(t.data) % (t.dtype.bits / 8) != 0)
        fail(PyExc_ValueError, name() + " is not aligned to its element size: clone it");
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

void require_contiguous(const dlpack::Tensor& t, const Name& name) {
    if (!is_contiguous(t))
        fail(PyExc_ValueError, name() + " must be contiguous: pass .contiguous() of it");
}

void require_vectors(const dlpack::Tensor& t, const Name& name) {
    if (size_of(require_dtype(t, name)) < 4)
        fail(PyExc_TypeError, name() + " must be float32 or float64, not " + describe(t.dtype));
    require_contiguous(t, name);
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

void register_tensor_args(py::module_& module) {
    layout_error = PyErr_NewException("eigenfilter._core.LayoutError", PyExc_ValueError, nullptr);
    module.attr("LayoutError") = py::handle(layout_error);
}

TensorArgs::TensorArgs(std::vector<Role> roles)
    : roles_(std::move(roles)), asked_others_(Reader::asked_others) {
    std::vector<dlpack::Tensor> first;
    for (size_t r = 0; r < roles_.size(); ++r) {
        if (!roles_[r].list.is_none() || !roles_[r].has(kOptional)) read_role(r, first);
    }
    require_compressible();
    require_unchanged();
}

void TensorArgs::require_compressible() const {
    const auto is_scales = [](const Role& role) { return role.has(kReadScales); };
    auto scales = std::find_if(roles_.begin(), roles_.end(), is_scales);
    if (scales == roles_.end()) return;  // no list of these roles is compressed
    for (const Role& role : roles_) {
        if (!role.has(kState) && !role.has(kMomenta)) continue;
        const std::string codes = role.name;
        if (has_codes(role, false) && scales->list.is_none())
            fail(PyExc_ValueError, codes + " are codes of 8 bits, and there are no " +
                                       scales->name + ": pass a float32 tensor [ceil(numel / " +
                                       std::to_string(kGroup) + ")] for each");
        if (!has_codes(role, true) && !scales->list.is_none())
            fail(PyExc_ValueError, std::string(scales->name) + " go with " + codes +
                                       " of 8 bits: pass None, or codes");
        scales = std::find_if(scales + 1, roles_.end(), is_scales);
    }
    const auto is_double = std::find(wide_.begin(), wide_.end(), DType::f64);
    const bool is_compressed = state_.value_or(dtype_) != dtype_ || correction_.has_value();
    if (is_double != wide_.end() && is_compressed)
        fail(PyExc_TypeError,
             Name{first_gradients(roles_.size())->name, is_double - wide_.begin()}() +
                 " is float64: a step of compressed tensors reads gradients of the parameters' "
                 "dtype or float32: convert it with .to()");
}

bool TensorArgs::has_codes(const Role& role, bool all) const {
    if (role.list.is_none()) return false;
    if (role.has(kState)) return state_ == DType::i8;
    if (wide_.empty()) return dtype_ == DType::i8;
    const auto codes = std::count(wide_.begin(), wide_.end(), DType::i8);
    return all ? codes == static_cast<std::ptrdiff_t>(size()) : codes > 0;
}

py::tuple TensorArgs::items_of_role(const Role& role, std::shared_ptr<std::vector<void*>>& known) {
    if (role.has(kOneTensor)) return py::make_tuple(role.list);
    const TensorList* const list = tensor_list(role.list);
    if (list == nullptr) return items_of(role.name, role.list);
    known = list->known();
    return list->tensors();
}

void TensorArgs::read_role(size_t r, std::vector<dlpack::Tensor>& first) {
    const Role& role = roles_[r];
    std::shared_ptr<std::vector<void*>> known_memory;
    const py::tuple items = items_[r] = items_of_role(role, known_memory);
    const size_t n = items.size();
    if (r == 0) {
        if (n == 0) fail(PyExc_ValueError, std::string(role.name) + " is empty");
        first.reserve(n);
        numel_.resize(n);
    } else if (n != size()) {
        fail(PyExc_ValueError, std::string(role.name) + " has " + std::to_string(n) +
                                   " tensors and " + roles_[0].name + " has " +
                                   std::to_string(size()) + ": pass lists of equal length");
    }
    data_[r].reserve(n);
    Reader reader;
    for (size_t i = 0; i < n; ++i) {
        const Name name = role.at(i);
        PyObject* const item = PyTuple_GET_ITEM(items.ptr(), i);
        void** const known = known_memory ? known_memory->data() + i : nullptr;
        const dlpack::Tensor t = reader.read(item, name, kept_, role.has(kWritten), known);
        if (reader.source() != item) shards_.push_back({r, i, reader.source()});
        if (role.has(kOneTensor)) require_vectors(t, name);
        check_type(t, name, r, i);
        if (r == 0) {
            check_first(t, name);
            first.push_back(t);
            numel_[i] = count(t);
        } else {
            check_layout(t, first[i], name, r, i);
        }
        data_[r].push_back(t.data);
    }
    api_ = reader.api();
}

void TensorArgs::check_layout(const dlpack::Tensor& t, const dlpack::Tensor& first,
                              const Name& name, size_t r, size_t i) {
    const std::string model = roles_[0].at(i)();
    if (roles_[r].has(kReadScales)) {
        if (t.ndim != 1 || t.shape[0] != groups_of(numel_[i]) || !is_contiguous(t))
            fail(PyExc_ValueError,
                 name() + " has " + describe_layout(t) + ": pass a contiguous tensor [" +
                     std::to_string(groups_of(numel_[i])) + "], a scale for every " +
                     std::to_string(kGroup) + " elements of " + model);
        return;
    }
    if (same_layout(t, first)) return;
    fail(layout_error, name() + " has " + describe_layout(t) + ", " + model + " has " +
                           describe_layout(first) +
                           (roles_[r].has(kOneTensor)
                                ? ": pass vectors of one shape"
                                : ": pass torch.empty_like(" + model + ").copy_(" + name() + ")"));
}

void TensorArgs::check_first(const dlpack::Tensor& t, const Name& name) {
    if (roles_[0].has(kOneTensor)) shape_.assign(t.shape, t.shape + t.ndim);
    if (!is_contiguous(t) && !is_dense(t))
        fail(PyExc_ValueError,
             name() + " is not dense (" + describe_layout(t) + "): pass .contiguous() of it");
}

void TensorArgs::check_type(const dlpack::Tensor& t, const Name& name, size_t r, size_t i) {
    DType dtype;
    const bool is_momentum = roles_[r].has(kMomenta);
    const bool may_be_whole = is_momentum || roles_[r].has(kState) || roles_[r].has(kCorrections);
    if (!may_be_whole || !whole_dtype_of(t.dtype, dtype) || (is_momentum && dtype != DType::i8))
        dtype = require_dtype(t, name);
    if (r == 0 && i == 0) {
        dtype_ = dtype;
        device_ = t.device;
    }
    if (!is_here(t.device))
        fail(PyExc_ValueError, name() + " is on " + describe(t.device) + " and " +
                                   roles_[0].at(0)() + " on " + describe(device_) +
                                   ": group tensors by device");
    if (!takes(dtype, r, i)) {
        const Role* const model = roles_[r].has(kGradients) ? first_gradients(r) : nullptr;
        fail(layout_error, name() + " is " + describe(t.dtype) + " and " +
                               (model != nullptr ? model->at(i) : roles_[0].at(0))() +
                               " is not: group tensors by dtype, or convert it with .to()");
    }
    require_aligned(t, name);
}

const Role* TensorArgs::first_gradients(size_t count) const {
    const auto* const end = roles_.data() + count;
    const auto* const first =
        std::find_if(roles_.data(), end, [](const Role& role) { return role.has(kGradients); });
    return first != end ? first : nullptr;
}

bool TensorArgs::takes(DType dtype, size_t r, size_t i) {
    if (roles_[r].has(kState) || roles_[r].has(kCorrections))
        return takes_compressed(dtype, roles_[r]);
    if (dtype == expected(roles_[r], i)) return true;
    if (!roles_[r].has(kGradients) || first_gradients(r) != nullptr) return false;
    if (r > 0 && dtype != wider(dtype_)) {
        const bool may_be_momentum = roles_[0].has(kWritten) && roles_[r].has(kMomenta);
        if (!may_be_momentum || !may_be_state(dtype)) return false;
        state_ = dtype;
    }
    if (wide_.empty()) wide_.assign(size(), dtype_);
    wide_[i] = dtype;
    return true;
}

bool TensorArgs::takes_compressed(DType dtype, const Role& role) {
    if (role.has(kCorrections)) {
        const bool is_one = dtype == DType::i8 || dtype == DType::i16;
        if (!correction_ && is_one && size_of(dtype_) == 2) correction_ = dtype;
        return correction_ == dtype;
    }
    if (!state_) state_ = may_be_state(dtype) ? dtype : dtype_;
    return dtype == state_of(role);
}

dlpack::Tensor TensorArgs::read_one(const char* name, PyObject*& object, bool written) {
    Reader reader;
    const dlpack::Tensor t = reader.read(object, {name}, kept_, written);
    kept_.push_back(py::reinterpret_borrow<py::object>(object));
    object = reader.source();
    return t;
}

Scalar TensorArgs::scalar(const char* name, py::handle value, Range range) {
    Scalar s;
    if (!is_tensor(value)) {
        s.value = number_of(name, value);
        require_in_range(name, s.value, range);
        require_unchanged();
        return s;
    }
    PyObject* source = value.ptr();
    const dlpack::Tensor t = read_one(name, source);
    DType dtype;
    if (count(t) != 1 || !dtype_of(t.dtype, dtype) || size_of(dtype) < 4)
        fail(PyExc_TypeError,
             std::string(name) + " must be a number or a one-element float32 or float64 tensor");
    require_aligned(t, {name});
    add(name, t.data, size_of(dtype), false, source);
    require_unchanged();
    if (t.device.type == dlpack::kCPU) {
        s.value = dtype == DType::f64 ? *static_cast<const double*>(t.data)
                                      : *static_cast<const float*>(t.data);
        const bool is_computed = range == Range::computed || range == Range::computed_not_zero;
        if (!is_computed) require_in_range(name, s.value, range);
        return s;
    }
    if (!is_here(t.device))
        fail(PyExc_ValueError, std::string(name) + " is on " + describe(t.device) +
                                   " and the tensors on " + describe(device_) +
                                   ": move it there or to the CPU");
    s.device = t.data;
    s.device_is_double = dtype == DType::f64;
    return s;
}

float* TensorArgs::flag(const char* name, py::handle value, unsigned traits) {
    if (value.is_none() && (traits & kOptional) != 0) return nullptr;
    if (value.is_none()) fail(PyExc_TypeError, std::string(name) + " must be a tensor");
    return static_cast<float*>(single(name, value, 32, (traits & kWritten) != 0));
}

dlpack::Tensor TensorArgs::single_tensor(const char* name, py::handle value, int bits, bool written,
                                         const Shape* shape) {
    PyObject* source = value.ptr();
    const dlpack::Tensor t = read_one(name, source, written);
    if (bits == kAnyBits) bits = t.dtype.bits == 64 ? 64 : 32;
    const bool fits = shape != nullptr ? Shape(t.shape, t.shape + t.ndim) == *shape : count(t) == 1;
    if (!fits || t.dtype.code != dlpack::kFloat || t.dtype.bits != bits || t.dtype.lanes != 1 ||
        !is_contiguous(t) || !is_here(t.device) ||
        reinterpret_cast<std::uintptr_t>(t.data) % (bits / 8) != 0)
        fail(PyExc_ValueError, std::string(name) + " must be a " +
                                   (shape != nullptr ? "contiguous" : "dense") + " float" +
                                   std::to_string(bits) + " tensor of " +
                                   (shape != nullptr ? "shape " + describe(*shape) : "1 element") +
                                   " on " + describe(device_));
    add(name, t.data, count(t) * (bits / 8), written, source);
    require_unchanged();
    return t;
}

void* TensorArgs::result(const char* name, py::handle value, bool& is_double) {
    const bool has_doubles =
        dtype_ == DType::f64 || std::count(wide_.begin(), wide_.end(), DType::f64) > 0;
    const dlpack::Tensor t = single_tensor(name, value, has_doubles ? 64 : kAnyBits, true, nullptr);
    is_double = t.dtype.bits == 64;
    return t.data;
}

void* TensorArgs::basis(const char* name, py::handle value, int64_t& rows, DType& dtype) {
    PyObject* source = value.ptr();
    const dlpack::Tensor t = read_one(name, source);
    dtype = require_dtype(t, {name});
    const Shape shape(t.shape, t.shape + t.ndim);
    const std::string text = name, first = roles_[0].name;
    if (shape.size() != 2 || shape[1] != shape_.back())
        fail(PyExc_ValueError, text + " must be [m, n] and " + first + " [n] or [b, n]: got " +
                                   describe(shape) + " and " + describe(shape_));
    require_contiguous(t, {name});
    require_aligned(t, {name});
    if (!is_here(t.device))
        fail(PyExc_ValueError,
             first + " and " + text + " are on different devices: move one of them");
    add(name, t.data, count(t) * size_of(dtype), false, source);
    require_unchanged();
    rows = shape[0];
    return t.data;
}

double* TensorArgs::workspace(std::int64_t size) {
    struct Torch {
        py::object empty = py::module_::import("torch").attr("empty");
        py::object float64 = py::module_::import("torch").attr("float64");
        py::tuple names = py::make_tuple("dtype", "device");
    };
    static const Torch* const torch = new Torch;  // never freed: Python may have ended before
    const py::int_ length(size);
    const py::object device = items_[0][0].attr("device");
    PyObject* const arguments[] = {length.ptr(), torch->float64.ptr(), device.ptr()};
    const auto memory = py::reinterpret_steal<py::object>(
        PyObject_Vectorcall(torch->empty.ptr(), arguments, 1, torch->names.ptr()));
    if (!memory) throw py::error_already_set();
    const Shape shape{size};
    return static_cast<double*>(single("workspace", memory, 64, true, &shape));
}

void TensorArgs::add(const char* name, const void* memory, int64_t bytes, bool written,
                     PyObject* source) {
    const auto begin = reinterpret_cast<std::uintptr_t>(memory);
    singles_.push_back({name, begin, begin + static_cast<std::uintptr_t>(bytes), written, source});
}

void TensorArgs::require_unchanged() {
    const std::uint64_t asked_others = Reader::asked_others;
    if (asked_others == asked_others_) return;
    const auto require_same = [&](const Name& name, PyObject* source, std::uintptr_t memory) {
        dlpack::Tensor t;
        if (api_->tensor_from_py_object(source, &t) != 0)
            PyErr_Clear();
        else if (reinterpret_cast<std::uintptr_t>(t.data) + t.byte_offset == memory)
            return;
        fail(PyExc_RuntimeError,
             name() +
                 " changed while the arguments were read, by code of a number's or tensor's "
                 "class: pass plain numbers and tensors");
    };
    auto shard = shards_.begin();
    for (size_t r = 0; r < roles_.size(); ++r) {
        for (size_t i = 0; i < data_[r].size(); ++i) {
            PyObject* source = PyTuple_GET_ITEM(items_[r].ptr(), i);
            if (shard != shards_.end() && shard->role == r && shard->index == i)
                source = (shard++)->source;
            require_same(roles_[r].at(i), source, reinterpret_cast<std::uintptr_t>(data_[r][i]));
        }
    }
    for (const Single& s : singles_) {
        if (s.source != nullptr) require_same({s.name}, s.source, s.begin);
    }
    asked_others_ = asked_others;
}

void TensorArgs::require_apart() const {
    struct Stretch {
        Stretch(std::uintptr_t begin, std::uint32_t role, std::uint32_t index)
            : begin(begin), role(role), index(index) {}
        std::uintptr_t begin;
        std::uint32_t role, index;  // of singles: the number of roles, and which of them
    };
    const auto singles = static_cast<std::uint32_t>(roles_.size());
    const auto end = [&](const Stretch& s) {
        if (s.role == singles) return singles_[s.index].end;
        return s.begin + static_cast<std::uintptr_t>(bytes(roles_[s.role], s.index));
    };
    const auto written = [&](const Stretch& s) {
        return s.role == singles ? singles_[s.index].written : roles_[s.role].has(kWritten);
    };
    const auto name = [&](const Stretch& s) {
        return s.role == singles ? singles_[s.index].name : roles_[s.role].at(s.index)();
    };
    // If no list is written, most lie outside of what is: between `low` and `high`.
    std::uintptr_t low = 0, high = UINTPTR_MAX;
    if (std::none_of(roles_.begin(), roles_.end(), [](auto& r) { return r.has(kWritten); })) {
        std::swap(low, high);
        for (const Single& s : singles_) {
            if (!s.written) continue;
            low = std::min(low, s.begin);
            high = std::max(high, s.end);
        }
    }
    std::vector<Stretch> all;
    all.reserve(size() * roles_.size() + singles_.size());
    const auto put = [&](std::uintptr_t begin, std::uint32_t role, std::uint32_t index) {
        const auto& s = all.emplace_back(begin, role, index);
        if (begin >= high || (low > 0 && end(s) <= low)) all.pop_back();
    };
    const auto before = [](const Stretch& a, const Stretch& b) { return a.begin < b.begin; };
    const auto sort_from = [&](std::size_t first) {  // a list is often in the order of its memory
        const auto from = all.begin() + static_cast<std::ptrdiff_t>(first);
        if (!std::is_sorted(from, all.end(), before)) std::sort(from, all.end(), before);
        std::inplace_merge(all.begin(), from, all.end(), before);
    };
    for (std::uint32_t r = 0; r < singles; ++r) {
        const std::size_t first = all.size();
        for (std::uint32_t i = 0; i < data_[r].size(); ++i) {
            if (numel_[i] > 0) put(reinterpret_cast<std::uintptr_t>(data_[r][i]), r, i);
        }
        sort_from(first);
    }
    const std::size_t first = all.size();
    for (std::uint32_t k = 0; k < singles_.size(); ++k) {
        if (singles_[k].begin < singles_[k].end) put(singles_[k].begin, singles, k);
    }
    sort_from(first);
    // Of the stretches so far, the one that reaches furthest, among all and among the written.
    struct Furthest {
        const Stretch* stretch = nullptr;
        std::uintptr_t end = 0;
        void take(const Stretch& s, std::uintptr_t end_of_s) {
            if (end_of_s > end) *this = {&s, end_of_s};
        }
    };
    Furthest furthest, furthest_written;
    for (const Stretch& s : all) {
        const bool is_written = written(s);
        const Furthest& other = is_written ? furthest : furthest_written;
        if (other.end > s.begin) {
            const bool is_first = s.role >= other.stretch->role;
            fail(PyExc_ValueError, name(is_first ? s : *other.stretch) + " and " +
                                       name(is_first ? *other.stretch : s) +
                                       " share memory, and at least one of them is written: "
                                       "clone one of them");
        }
        const std::uintptr_t end_of_s = end(s);
        furthest.take(s, end_of_s);
        if (is_written) furthest_written.take(s, end_of_s);
    }
}

void* TensorArgs::stream() const {
    void* stream = nullptr;
    if (api_->current_work_stream(device_.type, device_.id, &stream) != 0)
        throw py::error_already_set();
    return stream;
}

}  // namespace eigenfilter
