// The tensors and scalars of a call from Python, read and checked before a kernel writes anything.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/ops.hpp"
#include "reader.hpp"

namespace eigenfilter {

// One list of a call, or one tensor of vectors (float32 or float64, contiguous), with its name in
// messages; None: it is absent.
struct Role {
    const char* name;
    py::handle list;
    unsigned traits;

    bool has(Traits wanted) const { return (traits & wanted) == wanted; }
    Name at(std::size_t i) const {
        return {name, has(kOneTensor) ? -1 : static_cast<Py_ssize_t>(i)};
    }
};

// Sizes of a tensor's dimensions.
using Shape = std::vector<std::int64_t>;
std::string describe(const Shape& shape);

// Whether an argument is a tensor, by its type.
bool is_tensor(py::handle value);

// Throws ValueError unless a number is in a range.
void require_in_range(const char* name, double value, Range range);
// A Python number, which is no complex one, as a double, or TypeError.
double number_of(const char* name, py::handle value);

class TensorArgs {
 public:
    static constexpr std::size_t kMaxRoles = 8;

    // Reads and checks all lists; the first role must be present. Throws TypeError for what is no
    // usable tensor, LayoutError where the i-th tensors differ, ValueError for the rest.
    explicit TensorArgs(std::vector<Role> roles);

    std::size_t size() const { return numel_.size(); }
    DType dtype() const { return dtype_; }
    dlpack::Device device() const { return device_; }
    bool on_cpu() const { return device_.type == dlpack::kCPU; }
    const std::vector<std::int64_t>& numel() const { return numel_; }
    // Dtypes of the gradients, or nullptr where all are the lists'.
    const DType* wide() const { return wide_.empty() ? nullptr : wide_.data(); }
    // Data pointers of a role's list, or nullptr where it is absent.
    void* const* pointers(std::size_t role) const {
        return data_[role].empty() ? nullptr : data_[role].data();
    }
    // The same of the role that was constructed with this very pointer as its name.
    void* const* pointers(const char* name) const {
        for (std::size_t role = 0; role < roles_.size(); ++role) {
            if (roles_[role].name == name) return pointers(role);
        }
        throw std::logic_error(std::string("no list was read as ") + name);
    }
    // What a kernel is given, with no lists yet.
    Tensors tensors() const {
        return {dtype_,
                size(),
                numel_.data(),
                wide(),
                state_.value_or(dtype_),
                correction_.value_or(DType::i8)};
    }
    // The shape of the first role's tensor, where that is no list.
    const Shape& shape() const { return shape_; }

    // A hyperparameter: a number, or a 0-dim float32/float64 tensor here or on the CPU.
    Scalar scalar(const char* name, py::handle value, Range range);
    // One float32 on this device, or nullptr for None where it is optional.
    float* flag(const char* name, py::handle value, unsigned traits);
    // A contiguous tensor of this device of `bits` float bits and of a shape, or of one element.
    void* single(const char* name, py::handle value, int bits, bool written,
                 const Shape* shape = nullptr) {
        return single_tensor(name, value, bits, written, shape).data;
    }
    // One float32 or float64 to be written, which is as wide as the widest tensor, or wider.
    void* result(const char* name, py::handle value, bool& is_double);
    // Contiguous [rows, n] with the n of the first tensor, of any dtype of the kernels.
    void* basis(const char* name, py::handle value, std::int64_t& rows, DType& dtype);
    // Uninitialized memory on this device for so many doubles, until the call has ended: torch's
    // allocator gives it, in the order of the current stream.
    double* workspace(std::int64_t size);
    // Other memory that the kernel uses, of an object, or of one that somebody else looks after.
    void add(const char* name, const void* memory, std::int64_t bytes, bool written,
             PyObject* source = nullptr);

    // Throws RuntimeError where Python code that ran while the arguments were read, of a subclass
    // or of a number of someone else, has freed or replaced memory that was read before.
    void require_unchanged();
    // Throws ValueError where memory is shared, and written: a GPU reads while it writes.
    void require_apart() const;

    // The stream torch would launch on now, for this device.
    void* stream() const;

 private:
    // A tensor that is not in a list.
    struct Single {
        const char* name;
        std::uintptr_t begin, end;
        bool written;
        PyObject* source;
    };
    // The memory of a list's tensor that was read from its local shard.
    struct Shard {
        std::size_t role, index;
        PyObject* source;
    };
    void read_role(std::size_t r, std::vector<dlpack::Tensor>& first);
    py::tuple items_of_role(const Role& role, std::shared_ptr<std::vector<void*>>& known);
    void check_first(const dlpack::Tensor& t, const Name& name);
    void check_type(const dlpack::Tensor& t, const Name& name, std::size_t r, std::size_t i);
    // A tensor that is in no list; `object` becomes the one whose memory it is.
    dlpack::Tensor read_one(const char* name, PyObject*& object, bool written = false);
    dlpack::Tensor single_tensor(const char* name, py::handle value, int bits, bool written,
                                 const Shape* shape);
    // The first of `count` roles that holds gradients, whose dtypes others follow; or nullptr.
    const Role* first_gradients(std::size_t count) const;
    // Whether the i-th tensor of a role may have a dtype; notes one that is not the parameters'.
    bool takes(DType dtype, std::size_t r, std::size_t i);
    bool takes_compressed(DType dtype, const Role& role);
    // Whether a state may have a dtype that is not the parameters'.
    bool may_be_state(DType dtype) const {
        return dtype_ != DType::f64 &&
               (dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::i8);
    }
    // Whether some, or all, tensors of a role are codes.
    bool has_codes(const Role& role, bool all) const;
    // Throws unless the i-th tensor of a role is laid out as the first role's, or fits its groups.
    void check_layout(const dlpack::Tensor& t, const dlpack::Tensor& first, const Name& name,
                      std::size_t r, std::size_t i);
    DType expected(const Role& role, std::size_t i) const {
        if (role.has(kReadScales)) return DType::f32;
        if (role.has(kCorrections)) return *correction_;
        if (role.has(kState)) return state_of(role);
        return role.has(kGradients) && !wide_.empty() ? wide_[i] : dtype_;
    }
    DType state_of(const Role& role) const {
        return state_ == DType::i8 && role.has(kUnsigned) ? DType::u8 : *state_;
    }
    // Throws where codes lack their scales, or compressed tensors go with gradients in double.
    void require_compressible() const;
    std::int64_t bytes(const Role& role, std::size_t i) const {
        return (role.has(kReadScales) ? groups_of(numel_[i]) : numel_[i]) *
               size_of(expected(role, i));
    }
    bool is_here(const dlpack::Device& device) const {
        return device.type == device_.type && device.id == device_.id;
    }

    Borrowing borrowing_;
    DType dtype_{};
    std::optional<DType> state_;       // of states, where there are any
    std::optional<DType> correction_;  // of corrections
    dlpack::Device device_{};
    Shape shape_;
    const dlpack::ExchangeApi* api_ = nullptr;
    std::vector<std::int64_t> numel_;
    std::vector<DType> wide_;
    std::vector<Role> roles_;
    std::array<std::vector<void*>, kMaxRoles> data_;
    std::array<py::tuple, kMaxRoles> items_;
    std::vector<Shard> shards_;
    std::vector<Single> singles_;
    std::uint64_t asked_others_;    // Reader's count, up to which all is known to be unchanged
    std::vector<py::object> kept_;  // what was read, for as long as its memory is used
};

}  // namespace eigenfilter
