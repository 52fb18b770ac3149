// The operations as Python sees them: one template reads the arguments that core states, checks
// them, and runs where the tensors are.
#include <algorithm>
#include <iterator>
#include <utility>

#include "arguments.hpp"
#include "param_lists.hpp"
#include "tensor_args.hpp"

namespace eigenfilter {
namespace {

constexpr std::int64_t kMostPasses = 100;  // twice is enough

// Calls each(argument, value) for the arguments of an operation, which are constants to what is
// INLINED.
#define INLINED __attribute__((always_inline))  // until the end of this namespace
template <class Op, class Each, std::size_t... I>
void for_each_argument(const py::handle* values, const Each& each, std::index_sequence<I...>) {
    (each(Op::kArguments[I], values[I]), ...);
}
template <class Op, class Each>
void for_each_argument(const py::handle* values, const Each& each) {
    for_each_argument<Op>(values, each, std::make_index_sequence<kArgumentCount<Op>>{});
}

// Throws where the list is not there that an argument needs, unless it is something else.
template <class Op, class A>
void require_needed(const A& argument, const py::handle* values, const char* given,
                    const char* otherwise) {
    for_each_argument<Op>(values, [&](const auto& a, py::handle value) INLINED {
        if (a.list == argument.needs && value.is_none())
            fail(PyExc_ValueError, std::string(argument.name) + given + " needs " + a.name +
                                       ": pass tensors like the parameters, or " + argument.name +
                                       otherwise);
    });
}

template <class Op>
void read_flags(typename Op::Call& s, const py::handle* values) {
    for_each_argument<Op>(values, [&](const auto& a, py::handle value) INLINED {
        if (a.whole != nullptr) s.*a.whole = static_cast<int>(whole(a.name, value, 1, kMostPasses));
        if (a.flag != nullptr) s.*a.flag = truth(a.name, value);
        if (a.flag != nullptr && a.needs != nullptr && s.*a.flag)
            require_needed<Op>(a, values, "=True", "=False");
    });
}

// Whether a call writes to a list that is written only where a flag needs it.
template <class Op, class A>
bool is_saved(const typename Op::Call& s, const A& list) {
    if ((list.traits & kSaved) == 0) return false;
    for (const auto& a : Op::kArguments) {
        if (a.flag != nullptr && a.needs == list.list && s.*a.flag) return true;
    }
    return false;
}

// The lists or vectors; what is no gradient comes first, because gradients may be wider. Beside
// backups momenta are gradients like others.
template <class Op>
std::vector<Role> roles_of(const typename Op::Call& s, const py::handle* values) {
    std::vector<Role> roles;
    roles.reserve(TensorArgs::kMaxRoles);
    bool has_backups = false;
    for_each_argument<Op>(values, [&](const auto& a, py::handle value) INLINED {
        has_backups |= (a.traits & kSaved) != 0 && !value.is_none();
    });
    for_each_argument<Op>(values, [&](const auto& a, py::handle value) INLINED {
        if (a.list == nullptr && (a.vectors == nullptr || (a.traits & kBasis) != 0)) return;
        unsigned traits = a.traits;
        if ((traits & kSaved) != 0) traits = is_saved<Op>(s, a) ? kWritten : kOptional;
        if ((traits & kMomenta) == kMomenta && has_backups) traits = kGradients;
        roles.push_back({a.name, value, traits});
    });
    if constexpr ((Op::kArguments[0].traits & kGradients) == 0) return roles;
    const auto model = std::find_if(roles.begin(), roles.end(), [](const Role& role) {
        return !role.has(kGradients) && !role.has(kReadScales) &&
               !(role.has(kOptional) && role.list.is_none());
    });
    if (model != roles.end()) std::rotate(roles.begin(), model, model + 1);
    return roles;
}

// The first vectors' sizes and dtype, and where all lie that are like them.
template <class Op>
void take_vectors(typename Op::Call& s, const TensorArgs& args, const py::handle* values) {
    constexpr const auto& first = Op::kArguments[0];
    constexpr bool may_be_one = (first.traits & kMayBeOne) != 0;
    const Shape& shape = args.shape();
    const std::string name = first.name;
    if (shape.size() != 2 && !(may_be_one && shape.size() == 1))
        fail(PyExc_ValueError, name + " must be " + (may_be_one ? "[n] or [b, n]" : "[b, n]") +
                                   ": its shape is " + describe(shape));
    s.*first.rows = shape.size() == 2 ? shape[0] : 1;
    s.*first.columns = shape.back();
    s.*first.dtype = args.dtype();
    if (s.*first.rows > Op::kMost)
        fail(PyExc_ValueError, name + " must be of at most " + std::to_string(Op::kMost) +
                                   " vectors, not " + std::to_string(s.*first.rows));
    for_each_argument<Op>(values, [&](const auto& a, py::handle) INLINED {
        if (a.vectors == nullptr || (a.traits & kBasis) != 0) return;
        void* const* const p = args.pointers(a.name);
        s.*a.vectors = p != nullptr ? p[0] : nullptr;
    });
}

// The shape of doubles; that of one vector's lacks the number of vectors.
template <class Op, class A>
Shape shape_of(const typename Op::Call& s, const A& doubles, bool is_one) {
    Shape shape;
    for (const auto& size : doubles.sizes) {
        const bool is_left_out = is_one && size.member == Op::kArguments[0].rows;
        if (size.number > 0) shape.push_back(size.number);
        if (size.member != nullptr && !is_left_out) shape.push_back(s.*size.member);
    }
    return shape;
}

// A number, or what None stands for. Where the flag stops an update, the scale may be anything.
template <class Op, class A>
void read_number(typename Op::Call& s, const A& a, const py::handle* values, py::handle value,
                 const float* found_inf, TensorArgs& args) {
    if (value.is_none() && (a.range == Range::scale || a.range == Range::seed)) {
        (s.*a.number).value = a.range == Range::scale ? 1 : 0;
        return;
    }
    const bool is_stopped = found_inf != nullptr && args.on_cpu() && *found_inf != 0;
    const bool is_free = a.range == Range::scale && is_stopped;
    s.*a.number = args.scalar(a.name, value, is_free ? Range::any : a.range);
    if constexpr (kMayRound<Op>)  // wide dtypes are not rounded
        s.stochastic |= a.range == Range::seed && size_of(args.dtype()) == 2;
    if (a.needs != nullptr && ((s.*a.number).value != 0 || is_tensor(value)))
        require_needed<Op>(a, values, "", "=0");
}

// What is in no list: other tensors, and numbers.
template <class Op>
void read_others(typename Op::Call& s, const py::handle* values, const float* found_inf,
                 TensorArgs& args) {
    for_each_argument<Op>(values, [&](const auto& a, py::handle value) INLINED {
        if (a.number != nullptr) read_number<Op>(s, a, values, value, found_inf, args);
        if (a.result != nullptr) s.*a.result = args.result(a.name, value, s.*a.result_is_double);
        if ((a.traits & kBasis) != 0)
            s.*a.vectors = args.basis(a.name, value, s.*a.rows, s.*a.dtype);
        if (a.doubles == nullptr) return;
        const Shape shape = shape_of<Op>(s, a, args.shape().size() == 1);
        const bool is_written = (a.traits & kWritten) != 0;
        s.*a.doubles = static_cast<double*>(args.single(a.name, value, 64, is_written, &shape));
    });
}

// Throws unless the compiled kernels serve the tensors' device.
void require_served(const TensorArgs& args) {
    if (args.on_cpu()) return;
    if (args.device().type != dlpack::kCUDA)
        throw py::value_error(
            "the compiled kernels serve the CPU and NVIDIA GPUs: use backend=\"triton\" here");
    cuda::require();
}

// Throws where an ascent is to fill backups, or to start from them, and has compressed tensors.
void require_plain_backups(const Tensors& t) {
    if (t.b != nullptr && (t.c != nullptr || t.g_scales != nullptr))
        throw py::value_error(
            "backups go without corrections and momentum_scales: pass backups=None and save=False "
            "to move compressed tensors from where they are");
}

// What was read, for backends that are written in Python: data pointers by role and tensor, element
// counts, and the gradients' dtypes, or nothing where all are the lists'.
py::tuple table_of(const TensorArgs& args) {
    std::string pointers;
    for (std::size_t r = 0; r < TensorArgs::kMaxRoles; ++r) {
        if (void* const* p = args.pointers(r))
            pointers.append(reinterpret_cast<const char*>(p), args.size() * sizeof(void*));
    }
    const auto* const dtypes = reinterpret_cast<const char*>(args.wide());
    return py::make_tuple(py::bytes(pointers),
                          py::bytes(reinterpret_cast<const char*>(args.numel().data()),
                                    args.size() * sizeof(std::int64_t)),
                          py::bytes(dtypes, dtypes != nullptr ? args.size() : 0));
}

// An operation: reads and checks its arguments, and runs where the tensors are, without the GIL on
// the CPU. With no threads a call is a check: it ends before, and returns what it has read. Of
// vectors without elements there is nothing to do.
template <class Op, class OnCPU, class OnCUDA>
py::object call(const py::handle* values, const OnCPU& on_cpu, const OnCUDA& on_cuda) {
    typename Op::Call s{};
    const int threads = threads_of(values[kArgumentCount<Op>]);
    read_flags<Op>(s, values);
    TensorArgs args(roles_of<Op>(s, values));
    Tensors t = args.tensors();
    float* found_inf = nullptr;
    for_each_argument<Op>(values, [&](const auto& a, py::handle value) INLINED {
        if (a.list != nullptr) t.*a.list = args.pointers(a.name);
        if (a.is_found_inf) found_inf = args.flag(a.name, value, a.traits);
    });
    if constexpr (kListsWith<Op, kSaved> != 0) require_plain_backups(t);
    if constexpr (Op::kArguments[0].vectors != nullptr) take_vectors<Op>(s, args, values);
    read_others<Op>(s, values, found_inf, args);
    if (Op::kArguments[0].vectors != nullptr && args.numel()[0] == 0) return py::none();
    args.require_apart();
    if (threads == 0) return table_of(args);
    require_served(args);
    if (args.on_cpu()) {
        const py::gil_scoped_release release;
        on_cpu(t, s, found_inf, threads);
    } else {
        const auto workspace = [&](std::int64_t size) { return args.workspace(size); };
        on_cuda(t, s, found_inf, workspace, args.device().id, args.stream());
    }
    for_each_argument<Op>(values, [&](const auto& a, py::handle value) INLINED {
        TensorList* const list = is_saved<Op>(s, a) ? tensor_list(value) : nullptr;
        if (list != nullptr) list->filled = true;
    });
    return py::none();
}

// Registers an operation, and notes which arguments it writes to: "always", where a flag of this
// name is true, or "" if never.
template <class Op, class OnCPU, class OnCUDA>
void define_op(py::module_& module, py::dict& operations, const char* name, const OnCPU& on_cpu,
               const OnCUDA& on_cuda) {
    std::string parameters;
    py::dict writes;
    for (const auto& a : Op::kArguments) {
        parameters += std::string(a.name) + " ";
        const char* when = (a.traits & kWritten) != 0 ? "always" : "";
        for (const auto& other : Op::kArguments) {
            if ((a.traits & kSaved) != 0 && other.needs == a.list) when = other.name;
        }
        writes[a.name] = when;
    }
    operations[name] = writes;
    define_call<kArgumentCount<Op> + 1>(
        module, name, parameters + "num_threads", Op::kDoc,
        [=](const py::handle* values) { return call<Op>(values, on_cpu, on_cuda); });
}

template <class Op>
bool has_gradients(const std::string& name) {
    const auto& all = Op::kArguments;
    return std::any_of(std::begin(all), std::end(all), [&](const auto& argument) {
        return (argument.traits & kGradients) != 0 && name == argument.name;
    });
}

// Whether an operation takes a list of gradients by this name.
bool is_of_gradients(const std::string& name) {
#define HAS(operation, Op, cpu_arguments, cuda_arguments) || has_gradients<Op>(name)
#define UPDATE_HAS(operation, Scalars) || has_gradients<Scalars<Scalar>>(name)
    return false EIGENFILTER_UPDATES(UPDATE_HAS) EIGENFILTER_OTHERS(HAS);
#undef UPDATE_HAS
#undef HAS
}

// The check of lists by their names, some of which are those of gradients.
py::tuple check(py::handle names_given, py::handle lists_given, py::handle written_given) {
    const py::tuple names = items_of("names", names_given, "");
    const py::tuple lists = items_of("lists", lists_given, "");
    const py::tuple written = items_of("written", written_given, "");
    const std::size_t count = names.size();
    if (lists.size() != count || written.size() != count || count < 1 ||
        count > TensorArgs::kMaxRoles)
        throw py::value_error("names, lists and written must have equal lengths, 1 to " +
                              std::to_string(TensorArgs::kMaxRoles));
    std::vector<Role> roles;
    for (std::size_t r = 0; r < count; ++r) {
        PyObject* const name = PyTuple_GET_ITEM(names.ptr(), r);
        const char* const text = PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : nullptr;
        if (text == nullptr) {
            PyErr_Clear();
            throw py::type_error("names must be strings");
        }
        unsigned traits = is_of_gradients(text) ? kGradients : kRead;
        if (truth("written", PyTuple_GET_ITEM(written.ptr(), r))) traits |= kWritten;
        if (r > 0) traits |= kOptional;
        roles.push_back({text, PyTuple_GET_ITEM(lists.ptr(), r), traits});
    }
    const TensorArgs args(std::move(roles));
    args.require_apart();
    return table_of(args);
}

void require_cuda() { cuda::require(); }

// What the CUDA kernels were compiled for, in CMake's words.
py::tuple cuda_architectures() {
#ifdef EIGENFILTER_CUDA_ARCHITECTURES
    return py::tuple(py::str(EIGENFILTER_CUDA_ARCHITECTURES).attr("split")(","));
#else
    return py::tuple();
#endif
}

double value_of(const Scalar& number) { return number.value; }

#undef INLINED
}  // namespace

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"  // no call has all
void register_ops(py::module_& module) {
    module.attr("cuda_compiled") = cuda::compiled();
    module.attr("cuda_architectures") = cuda_architectures();
    module.attr("cuda_device_type") = kCudaDeviceType;
    module.attr("group_size") = kGroup;
    module.attr("most_rows") = kMostRows;
    module.attr("most_vectors") = kMostVectors;
    module.attr("most_softmax_rows") = CrossEntropyHvp::kMost;
    define(module, "require_cuda", "",
           "Raise RuntimeError, with what to do, unless the CUDA kernels were compiled.",
           &require_cuda);
    define(module, "check", "names lists written",
           "Raise what the kernels raise for lists that do not go together; None is an absent "
           "list.",
           &check);
    py::dict operations;
#define DEFINE(name, Op, cpu_arguments, cuda_arguments)                                  \
    define_op<Op>(                                                                       \
        module, operations, #name,                                                       \
        [](const Tensors& t, const Op::Call& s, float* found_inf, int threads) {         \
            cpu::name cpu_arguments;                                                     \
        },                                                                               \
        [](const Tensors& t, const Op::Call& s, float* found_inf, const auto& workspace, \
           int device, cuda::Stream stream) { cuda::name cuda_arguments; });
#define DEFINE_UPDATE(name, Scalars)                                          \
    DEFINE(name, Scalars<Scalar>, (t, read(s, value_of), found_inf, threads), \
           (t, s, found_inf, device, stream))
    EIGENFILTER_UPDATES(DEFINE_UPDATE)
    EIGENFILTER_OTHERS(DEFINE)
    module.attr("operations") = operations;
#undef DEFINE_UPDATE
#undef DEFINE
}
#pragma GCC diagnostic pop

}  // namespace eigenfilter
