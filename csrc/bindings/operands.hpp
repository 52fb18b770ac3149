// Lists of tensors from Python, read and checked before a kernel writes anything.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "arguments.hpp"
#include "dlpack.hpp"
#include "eigenfilter/contract.hpp"
#include "exchange.hpp"

namespace eigenfilter {

// A list that is passed again and again, an optimizer's own. With `trust` what is slow to check
// (lazy negation, inference mode) is checked when a tensor's memory is first seen and when it
// changes, and not at every use: for tensors that nobody else negates where they are. With `hold`
// the list owns a reference to each tensor beyond Python's, which makes reading it twice as fast
// (torch then need not keep the Python object's count in step); not for parameters, which torch may
// want to swap.
class TensorList {
 public:
    TensorList(py::handle tensors, bool hold, bool trust);
    std::size_t size() const { return PyTuple_GET_SIZE(tensors_.ptr()); }
    py::object get(py::handle index) const;
    const py::tuple& tensors() const { return tensors_; }
    // [n] data pointers found sound, or null without trust; shared, because Python code may end a
    // list that is being read.
    const std::shared_ptr<std::vector<void*>>& known() const { return known_; }

    // Whether a kernel has filled the tensors, these being backups. Set in the call that fills
    // them: no interrupt can come between.
    bool filled = false;

 private:
    py::tuple tensors_;
    std::shared_ptr<std::vector<void*>> known_;
    struct Release {
        void operator()(dlpack::Managed* t) const { t->deleter(t); }
    };
    std::vector<std::unique_ptr<dlpack::Managed, Release>> held_;
};

// The list that a Python object is, or nullptr for an object of another type; throws TypeError for
// one whose __init__ has not run.
TensorList* tensor_list(py::handle object);

// Whether an argument is a tensor, by its type.
bool is_tensor(py::handle value);

// Registers TensorList and LayoutError with the module.
void register_operands(py::module_& module);

// What a role is: the kernel writes it; it may be absent, which None says; it holds gradients, each
// of which may have the next wider dtype than the lists' (where gradients come first, as in a
// reduction, each has its own); it is one tensor and no list.
enum Traits : unsigned { kRead = 0, kWritten = 1, kOptional = 2, kGradients = 4, kOneTensor = 8 };

// One list of a call, or one tensor, with its name in messages.
struct Role {
    const char* name;
    py::handle list;
    unsigned traits;

    bool written() const { return traits & kWritten; }
    bool optional() const { return traits & kOptional; }
    bool gradients() const { return traits & kGradients; }
    // The i-th tensor's name.
    std::string at(std::size_t i) const {
        return traits & kOneTensor ? name : std::string(name) + "[" + std::to_string(i) + "]";
    }
};

// Sizes of a tensor's dimensions.
using Shape = std::vector<std::int64_t>;
std::string describe(const Shape& shape);

// What a hyperparameter must be; one on a GPU is not read.
struct Range {
    bool (*holds)(double value);
    const char* text;
    // Whether a tensor's value is left alone: it is computed from gradients, and where these are
    // not finite it is neither, on the CPU as on a GPU.
    bool computed = false;
};
extern const Range kFinite, kComputed, kNotZero, kFraction, kNotNegative, kCount, kSeed, kPositive;

class Operands {
 public:
    static constexpr std::size_t kMaxRoles = 5;

    // Reads and checks everything; the first role must be present. Throws TypeError for what is no
    // usable tensor, LayoutError where the i-th tensors differ, ValueError for the rest.
    explicit Operands(std::initializer_list<Role> roles);
    Operands(const Role* roles, std::size_t count);

    std::size_t size() const { return numel_.size(); }
    DType dtype() const { return dtype_; }
    dlpack::Device device() const { return device_; }
    bool on_cpu() const { return device_.type == dlpack::kCPU; }
    const std::vector<std::int64_t>& numel() const { return numel_; }
    // Of the first role's first tensor.
    const Shape& shape() const { return shape_; }
    // Throws unless that lies in the order of its dimensions, and of vectors unless it is float32
    // or float64.
    void require_contiguous() const;
    void require_vectors() const;
    // Dtypes of the gradients, or nullptr where all are the lists'.
    const DType* wide() const { return wide_.empty() ? nullptr : wide_.data(); }
    // Data pointers of the role's list, or nullptr where it is absent.
    void* const* pointers(std::size_t role) const {
        return data_[role].empty() ? nullptr : data_[role].data();
    }
    // The stream torch would launch on now, for this device.
    void* stream() const;

    // A hyperparameter: a number, or a 0-dim float32/float64 tensor here or on the CPU.
    Scalar scalar(const char* name, py::handle value, const Range& range);
    // One float32 on this device, or nullptr for None.
    float* flag(const char* name, py::handle value, bool written = false);
    // A contiguous tensor of this device of `bits` float bits, of one shape; of {1}, or of any
    // other that has one element.
    void* single(const char* name, py::handle value, const Shape& shape, int bits, bool written);
    // Uninitialized memory on this device for so many doubles, until the call has ended: torch's
    // allocator gives it, in the order of the current stream.
    double* workspace(std::int64_t size);
    // Throws RuntimeError where Python code that ran while the arguments were read, of a subclass
    // or of a number of someone else, has freed or replaced memory that was read before.
    void require_unchanged();
    // Throws ValueError where memory shares with a list or with what was read before, and one of
    // both is written: a GPU reads them while it writes.
    void keep_apart(const char* name, const void* memory, std::int64_t bytes, bool written,
                    PyObject* source = nullptr);

 private:
    // A tensor that is not in a list.
    struct Single {
        std::string name;
        std::uintptr_t begin, end;
        bool written;
        PyObject* source;  // what has the memory; null where another object looks after it
    };
    // The memory of a list's tensor that was read from its local shard.
    struct Shard {
        std::size_t role, index;
        PyObject* source;
    };
    void require_same(const std::string& name, PyObject* source, const void* memory) const;
    void read_role(const Role* roles, std::size_t r, std::vector<dlpack::Tensor>& first);
    py::tuple items_of_role(const Role& role, std::shared_ptr<std::vector<void*>>& known);
    template <class Name>
    void check_type(const dlpack::Tensor& t, const Name& name, const Role* roles, std::size_t r,
                    std::size_t i);
    // Whether the i-th tensor of a role may have a dtype; notes that of a wide gradient.
    bool takes(DType dtype, const Role* roles, std::size_t r, std::size_t i);
    DType expected(const Role& role, std::size_t i) const {
        return role.gradients() && !wide_.empty() ? wide_[i] : dtype_;
    }
    void check_overlap(const Role* roles, std::size_t count) const;

    Borrowing borrowing_;
    DType dtype_{};
    dlpack::Device device_{};
    Shape shape_;
    bool is_contiguous_ = true;
    const dlpack::ExchangeApi* api_ = nullptr;
    std::vector<std::int64_t> numel_;
    std::vector<DType> wide_;
    std::array<std::vector<void*>, kMaxRoles> data_;
    std::vector<Role> roles_;
    std::array<py::tuple, kMaxRoles> items_;
    std::vector<Shard> shards_;
    std::vector<Single> singles_;
    std::uint64_t asked_others_;    // Reader's count, up to which all is known to be unchanged
    std::vector<py::object> kept_;  // what was read, for as long as its memory is used
};

}  // namespace eigenfilter
