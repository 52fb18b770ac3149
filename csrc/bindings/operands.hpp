// Lists of tensors from Python, read and checked before a kernel writes anything.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <memory>
#include <vector>

#include "dlpack.hpp"
#include "eigenfilter/contract.hpp"

namespace eigenfilter {

namespace py = pybind11;

// A list that is passed again and again, an optimizer's own: what is slow to check (lazy negation)
// is checked when a tensor's memory is first seen and when it changes. With `hold` the list owns a
// reference to each tensor beyond Python's, which makes reading it twice as fast (torch then need
// not keep the Python object's count in step); not for parameters, which torch may want to swap.
class TensorList {
 public:
    TensorList(const py::iterable& tensors, bool hold);
    std::size_t size() const { return PyList_GET_SIZE(tensors_.ptr()); }
    py::object get(Py_ssize_t i) const;
    py::list tensors() const { return tensors_; }
    std::vector<void*>& known() { return known_; }

    // Whether a kernel has filled the tensors, these being backups. Set in the call that fills
    // them: no interrupt can come between.
    bool filled = false;

 private:
    py::list tensors_;
    std::vector<void*> known_;  // [n] data pointers found sound
    struct Release {
        void operator()(dlpack::Managed* t) const { t->deleter(t); }
    };
    std::vector<std::unique_ptr<dlpack::Managed, Release>> held_;
};

// Registers TensorList and LayoutError with the module.
void register_operands(py::module_& module);

// One list of a call: its name in messages, the list (None: absent), whether the kernel writes it,
// whether it may be absent, and whether it holds gradients, each of which may have the next wider
// dtype than the lists'. Where gradients come first, as in a reduction, each has its own.
struct Role {
    const char* name;
    py::handle list;
    bool written;
    bool optional = false;
    bool gradients = false;
};

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
    // Dtypes of the gradients, or nullptr where all are the lists'.
    const DType* wide() const { return wide_.empty() ? nullptr : wide_.data(); }
    // Data pointers of the role's list, or nullptr where it is absent.
    void* const* pointers(std::size_t role) const {
        return data_[role].empty() ? nullptr : data_[role].data();
    }
    // The stream torch would launch on now, for this device.
    void* stream() const;

    // A hyperparameter: a number, or a 0-dim float32/float64 tensor here or on the CPU.
    Scalar scalar(const char* name, py::handle value) const;
    // One float32 on this device, or nullptr for None.
    float* flag(const char* name, py::handle value) const;
    // A one-element tensor of this device and of `bits` float bits that a kernel writes.
    void* output(const char* name, py::handle value, std::int64_t numel, int bits) const;

 private:
    void read_role(const Role* roles, std::size_t r, std::vector<dlpack::Tensor>& first);
    template <class Name>
    void check_type(const dlpack::Tensor& t, const Name& name, const Role* roles, std::size_t r,
                    std::size_t i);
    // Whether the i-th tensor of a role may have a dtype; notes that of a wide gradient.
    bool takes(DType dtype, const Role* roles, std::size_t r, std::size_t i);
    DType expected(const Role& role, std::size_t i) const {
        return role.gradients && !wide_.empty() ? wide_[i] : dtype_;
    }
    void check_overlap(const Role* roles, std::size_t count) const;

    DType dtype_{};
    dlpack::Device device_{};
    const dlpack::ExchangeApi* api_ = nullptr;
    std::vector<std::int64_t> numel_;
    std::vector<DType> wide_;
    std::array<std::vector<void*>, kMaxRoles> data_;
};

}  // namespace eigenfilter
