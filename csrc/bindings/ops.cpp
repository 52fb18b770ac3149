// The operations as Python sees them: read the arguments, then run where the tensors are.
#include <algorithm>
#include <iterator>
#include <string_view>

#include "arguments.hpp"
#include "param_lists.hpp"
#include "tensor_args.hpp"

namespace eigenfilter {
namespace {

constexpr std::int64_t kMostPasses = 100;     // twice is enough
constexpr std::int64_t kMostVectors = 65535;  // of a GPU's grid

// The loss scale; where the flag stops the update it may be anything.
Scalar scale_of(TensorArgs& args, py::handle grad_scale, const float* flag = nullptr) {
    if (grad_scale.is_none()) return Scalar{1.0};
    const bool stopped = flag != nullptr && args.on_cpu() && *flag != 0;
    return args.scalar("grad_scale", grad_scale, stopped ? Range::any : Range::positive);
}

// Throws unless the compiled kernels serve the tensors' device.
void require_served(const TensorArgs& args) {
    if (args.on_cpu()) return;
    if (args.device().type != dlpack::kCUDA)
        throw py::value_error(
            "the compiled kernels serve the CPU and NVIDIA GPUs: use backend=\"triton\" here");
    cuda::require();
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

// Runs a kernel where its tensors are, without the GIL on the CPU, and returns true. With no
// threads the call was a check of the arguments, which ends here.
template <class OnCPU, class OnCUDA>
bool run(const TensorArgs& args, int threads, OnCPU on_cpu, OnCUDA on_cuda) {
    args.require_apart();
    if (threads == 0) return false;
    require_served(args);
    if (args.on_cpu()) {
        const py::gil_scoped_release release;
        on_cpu();
    } else {
        on_cuda(args.device().id, args.stream());
    }
    return true;
}

// What a call of lists returns: nothing, or, where it was a check, what that has read.
py::object outcome(bool ran, const TensorArgs& args) {
    if (ran) return py::none();
    return table_of(args);
}

// Where an argument stands among those of an update.
template <class Scalars>
constexpr std::size_t position_of(std::string_view name) {
    std::size_t i = 0;
    while (Scalars::kArguments[i].name != name) ++i;
    return i;
}

// Whether an update saves the parameters, which needs tensors to save them to.
template <class Scalars>
bool saves(const Scalars& s, const py::handle* values) {
    if constexpr (kListsWith<Scalars, kSaved> != 0) {
        if (s.save && values[position_of<Scalars>("backups")].is_none())
            throw py::value_error(
                "save=True needs backups: pass tensors like the parameters, or save=False");
        return s.save;
    }
    return false;
}

template <class Scalars>
std::vector<Role> roles_of(const py::handle* values, bool is_saving) {
    static_assert(count_arguments<Scalars>([](const auto& a) { return a.list != nullptr; }) <=
                  static_cast<int>(TensorArgs::kMaxRoles));
    std::vector<Role> roles;
    roles.reserve(TensorArgs::kMaxRoles);
    for (const auto& a : Scalars::kArguments) {
        const unsigned saved = is_saving ? kWritten : kOptional;
        const unsigned traits = a.traits & kSaved ? saved : a.traits;
        if (a.list != nullptr) roles.push_back({a.name, *values, traits});
        ++values;
    }
    return roles;
}

template <class Scalars>
void read_numbers(Scalars& s, TensorArgs& args, const py::handle* values) {
    for (const auto& a : Scalars::kArguments) {
        const bool is_no_seed = a.range == Range::seed && values->is_none();
        if (a.number != nullptr && !is_no_seed) s.*a.number = args.scalar(a.name, *values, a.range);
        ++values;
    }
}

void require_momenta(const SgdStepScalars<Scalar>& s, const py::handle* values) {
    using Scalars = SgdStepScalars<Scalar>;
    constexpr auto momenta = position_of<Scalars>("momenta");
    constexpr auto momentum = position_of<Scalars>("momentum");
    if (!values[momenta].is_none()) return;
    constexpr auto extrapolation = position_of<Scalars>("extrapolation");
    const auto is_wanted = [&](const Scalar& s, std::size_t position) {
        return s.value != 0 || is_tensor(values[position]);
    };
    if (s.nesterov || is_wanted(s.momentum, momentum) || is_wanted(s.extrapolation, extrapolation))
        throw py::value_error(
            "momentum, nesterov and extrapolation need momenta: pass buffers, zeros at first");
}

// An update, as ops.hpp describes it: `values` are its arguments.
template <template <class> class Of>
py::object update(const py::handle* values,
                  void (*on_cpu)(const Tensors&, const Of<double>&, const float*, int),
                  void (*on_cuda)(const Tensors&, const Of<Scalar>&, const float*, int,
                                  cuda::Stream)) {
    using Scalars = Of<Scalar>;
    constexpr std::size_t count = kArgumentCount<Scalars>;
    const py::handle grad_scale = values[count], found_inf = values[count + 1];
    Scalars s{};
    for (std::size_t i = 0; i < count; ++i) {
        const auto& a = Scalars::kArguments[i];
        if (a.flag != nullptr) s.*a.flag = truth(a.name, values[i]);
    }
    const bool is_saving = saves(s, values);
    const int threads = threads_of(values[count + 2]);

    TensorArgs args(roles_of<Scalars>(values, is_saving));
    Tensors t = args.tensors();
    std::size_t role = 0;
    for (const auto& a : Scalars::kArguments) {
        if (a.list != nullptr) t.*a.list = args.pointers(role++);
    }
    const float* const flag = args.flag("found_inf", found_inf);
    read_numbers(s, args, values);
    s.grad_scale = scale_of(args, grad_scale, flag);
    if constexpr (kMayRound<Scalars>)  // no seed rounds to nearest; wide dtypes are not rounded
        s.stochastic =
            size_of(t.dtype) == 2 && !values[position_of<Scalars>("rounding_seed")].is_none();
    if constexpr (std::is_same_v<Scalars, SgdStepScalars<Scalar>>) require_momenta(s, values);

    const auto value_of = [](const Scalar& each) { return each.value; };
    const bool ran = run(
        args, threads, [&] { on_cpu(t, read(s, value_of), flag, threads); },
        [&](int device, void* stream) { on_cuda(t, s, flag, device, stream); });
    if (ran && is_saving) {
        TensorList* const list = tensor_list(values[position_of<Scalars>("backups")]);
        if (list != nullptr) list->filled = true;
    }
    return outcome(ran, args);
}

template <template <class> class Of, class OnCPU, class OnCUDA>
void define_update(py::module_& module, const char* name, OnCPU* on_cpu, OnCUDA* on_cuda) {
    std::string parameters;
    for (const auto& a : Of<Scalar>::kArguments) parameters += std::string(a.name) + " ";
    parameters += "grad_scale found_inf num_threads";
    define_call<kArgumentCount<Of<Scalar>> + 3>(
        module, name, parameters, Of<Scalar>::kDoc,
        [=](const py::handle* values) { return update<Of>(values, on_cpu, on_cuda); });
}

// The tensors of a reduction, and the weights if there are any, whose dtype they may exceed.
TensorArgs reduced(py::handle list, py::handle weights = py::none()) {
    const Role tensors{"tensors", list, kGradients};
    if (weights.is_none()) return TensorArgs({tensors});
    return TensorArgs({{"weights", weights, kRead}, tensors});
}

Tensors reduction(const TensorArgs& args, bool weighted) {
    Tensors t = args.tensors();
    t.x = args.pointers(weighted ? 1 : 0);
    if (weighted) t.g = args.pointers(0);
    return t;
}

py::object norm(py::handle list, py::handle out, py::handle weights, py::handle grad_scale,
                py::handle num_threads) {
    const int threads = threads_of(num_threads);
    bool is_double = py::getattr(out, "itemsize", py::int_(4)).equal(py::int_(8));
    TensorArgs args = reduced(list, weights);
    const Tensors t = reduction(args, !weights.is_none());
    const Scalar scale = scale_of(args, grad_scale);
    for (std::size_t i = 0; i < t.n; ++i) is_double |= t.gradient(i) == DType::f64;
    void* const result = args.single("out", out, is_double ? 64 : 32, true);
    const bool ran = run(
        args, threads,
        [&] {
            const double value = cpu::norm(t, threads) * (1 / scale.value);
            if (is_double)
                *static_cast<double*>(result) = value;
            else
                *static_cast<float*>(result) = static_cast<float>(value);
        },
        [&](int device, void* stream) {
            double* const workspace = args.workspace(cuda::norm_workspace(t));
            cuda::norm(t, scale, result, is_double, workspace, device, stream);
        });
    return outcome(ran, args);
}

py::object flag_nonfinite(py::handle list, py::handle found_inf, py::handle num_threads) {
    const int threads = threads_of(num_threads);
    TensorArgs args = reduced(list);
    const Tensors t = reduction(args, false);
    float* const flag = args.flag("found_inf", found_inf, true);
    if (flag == nullptr) throw py::type_error("found_inf must be a tensor");
    const bool ran = run(
        args, threads,
        [&] {
            if (cpu::has_nonfinite(t, threads)) *flag = 1;
        },
        [&](int device, void* stream) { cuda::flag_nonfinite(t, flag, device, stream); });
    return outcome(ran, args);
}

double* doubles(TensorArgs& args, const char* name, py::handle tensor, const Shape& shape,
                bool written) {
    return static_cast<double*>(args.single(name, tensor, 64, written, &shape));
}

void require_at_most(std::int64_t most, const char* name, std::int64_t vectors) {
    if (vectors > most)
        fail(PyExc_ValueError, std::string(name) + " must be of at most " + std::to_string(most) +
                                   " vectors, not " + std::to_string(vectors));
}

// w [n] or [b, n], basis [m, n], coefficients [m] or [b, m], norms [] or [b]. w and the basis have
// dtypes and shapes of their own, and so are read apart.
void orthogonalize(py::handle w_given, py::handle basis, py::handle coefficients, py::handle norms,
                   py::handle passes_given, py::handle num_threads) {
    const int threads = threads_of(num_threads);
    const auto passes = static_cast<int>(whole("passes", passes_given, 1, kMostPasses));
    TensorArgs w({{"w", w_given, kWritten | kOneTensor}});
    TensorArgs q({{"basis", basis, kOneTensor}});
    const Shape of_w = w.shape(), of_q = q.shape();
    if (of_q.size() != 2 || of_w.empty() || of_w.size() > 2 || of_w.back() != of_q[1])
        fail(PyExc_ValueError, "basis must be [m, n] and w [n] or [b, n]: got " + describe(of_q) +
                                   " and " + describe(of_w));
    w.require_vectors();
    q.require_contiguous();
    if (q.device().type != w.device().type || q.device().id != w.device().id)
        throw py::value_error("w and basis are on different devices: move one of them");
    const Shape of_norms(of_w.begin(), of_w.end() - 1);
    Shape of_coefficients = of_norms;
    of_coefficients.push_back(of_q[0]);
    Orthogonalization p{};
    p.basis_dtype = q.dtype();
    p.vector_dtype = w.dtype();
    p.rows = of_q[0];
    p.columns = of_q[1];
    p.count = of_w.size() == 2 ? of_w[0] : 1;
    p.basis = q.pointers(0)[0];
    p.vectors = w.pointers(0)[0];
    p.passes = passes;
    require_at_most(kMostVectors, "w", p.count);
    w.add("basis", p.basis, q.numel()[0] * size_of(q.dtype()), false);
    p.coefficients = doubles(w, "coefficients", coefficients, of_coefficients, true);
    p.norms = doubles(w, "norms", norms, of_norms, true);
    q.require_unchanged();
    if (p.count * p.columns == 0) return;
    run(
        w, threads, [&] { cpu::orthogonalize(p, threads); },
        [&](int device, void* stream) {
            const auto size = cuda::orthogonalize_workspace(p.rows, p.columns, p.count);
            cuda::orthogonalize(p, w.workspace(size), device, stream);
        });
}

// The shape [b, n] of vectors, of which there may be `most`.
Shape shape_of_vectors(const TensorArgs& args, const char* name, std::int64_t most) {
    const Shape& shape = args.shape();
    if (shape.size() != 2)
        fail(PyExc_ValueError,
             std::string(name) + " must be [b, n]: its shape is " + describe(shape));
    args.require_vectors();
    require_at_most(most, name, shape[0]);
    return shape;
}

// Runs a kernel over vectors [b, n] that takes so many sums over their columns. Of vectors without
// elements it has nothing to do.
template <class OnCPU, class OnCUDA>
void run_over(TensorArgs& args, std::int64_t sums, int threads, OnCPU on_cpu, OnCUDA on_cuda) {
    const std::int64_t columns = args.shape()[1];
    if (args.shape()[0] * columns == 0) return;
    run(args, threads, on_cpu, [&](int device, void* stream) {
        double* const workspace =
            sums > 0 ? args.workspace(cuda::sums_workspace(sums, columns)) : nullptr;
        on_cuda(workspace, device, stream);
    });
}

// q, w [b, n]; sums [2, b]
void row_dots(py::handle q, py::handle w, py::handle sums, py::handle num_threads) {
    const int threads = threads_of(num_threads);
    TensorArgs args({{"q", q, kOneTensor}, {"w", w, kOneTensor}});
    const Shape shape = shape_of_vectors(args, "q", kMostVectors);
    Recurrence r{args.dtype(), shape[0], shape[1]};
    r.q = args.pointers(0)[0];
    r.w = args.pointers(1)[0];
    r.sums = doubles(args, "sums", sums, {2, r.rows}, true);
    run_over(
        args, 2 * r.rows, threads, [&] { cpu::row_dots(r, threads); },
        [&](double* workspace, int device, void* stream) {
            cuda::row_dots(r, workspace, device, stream);
        });
}

// u, q, w [b, n]; factors [3, b]; sums [2, b]
void lanczos_step(py::handle u, py::handle q, py::handle w, py::handle factors, py::handle sums,
                  py::handle num_threads) {
    const int threads = threads_of(num_threads);
    TensorArgs args({{"u", u, kWritten | kOneTensor}, {"q", q, kOneTensor}, {"w", w, kOneTensor}});
    const Shape shape = shape_of_vectors(args, "u", kMostVectors);
    Recurrence r{args.dtype(), shape[0], shape[1]};
    r.u = args.pointers(0)[0];
    r.q = args.pointers(1)[0];
    r.w = args.pointers(2)[0];
    r.factors = doubles(args, "factors", factors, {3, r.rows}, false);
    r.sums = doubles(args, "sums", sums, {2, r.rows}, true);
    run_over(
        args, 2 * r.rows, threads, [&] { cpu::lanczos_step(r, threads); },
        [&](double* workspace, int device, void* stream) {
            cuda::lanczos_step(r, workspace, device, stream);
        });
}

// vectors [b, n]; out [b, b]
void gram(py::handle vectors, py::handle out, py::handle num_threads) {
    const int threads = threads_of(num_threads);
    TensorArgs args({{"vectors", vectors, kOneTensor}});
    const Shape shape = shape_of_vectors(args, "vectors", kMostRows);
    const Rows v{args.dtype(), shape[0], shape[1], args.pointers(0)[0]};
    double* const products = doubles(args, "out", out, {v.rows, v.rows}, true);
    run_over(
        args, v.rows * v.rows, threads, [&] { cpu::gram(v, products, threads); },
        [&](double* workspace, int device, void* stream) {
            cuda::gram(v, products, workspace, device, stream);
        });
}

// vectors [b, n]; factors [b, b]
void mix_rows(py::handle vectors, py::handle factors, py::handle num_threads) {
    const int threads = threads_of(num_threads);
    TensorArgs args({{"vectors", vectors, kWritten | kOneTensor}});
    const Shape shape = shape_of_vectors(args, "vectors", kMostRows);
    const Rows v{args.dtype(), shape[0], shape[1], args.pointers(0)[0]};
    const double* const lower = doubles(args, "factors", factors, {v.rows, v.rows}, false);
    run_over(
        args, 0, threads, [&] { cpu::mix_rows(v, lower, threads); },
        [&](double*, int device, void* stream) { cuda::mix_rows(v, lower, device, stream); });
}

// What names a list of gradients in Python.
bool names_gradients(const std::string& name) {
    return name == "grads" || name == "base_grads" || name == "tensors";
}

py::tuple check(py::handle names_given, py::handle lists_given, py::handle written_given) {
    const py::tuple names = items_of("names", names_given, "");
    const py::tuple lists = items_of("lists", lists_given, "");
    const py::tuple written = items_of("written", written_given, "");
    const std::size_t count = names.size();
    if (lists.size() != count || written.size() != count || count < 1 ||
        count > TensorArgs::kMaxRoles)
        throw py::value_error("names, lists and written must have equal lengths, 1 to 5");
    std::vector<Role> roles;
    for (std::size_t r = 0; r < count; ++r) {
        PyObject* const name = PyTuple_GET_ITEM(names.ptr(), r);
        const char* const text = PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : nullptr;
        if (text == nullptr) {
            PyErr_Clear();
            throw py::type_error("names must be strings");
        }
        unsigned traits = names_gradients(text) ? kGradients : kRead;
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

}  // namespace

void register_ops(py::module_& module) {
    module.attr("cuda_compiled") = cuda::compiled();
    module.attr("cuda_architectures") = cuda_architectures();
    module.attr("cuda_device_type") = kCudaDeviceType;
    define(module, "require_cuda", "",
           "Raise RuntimeError, with what to do, unless the CUDA kernels were compiled.",
           &require_cuda);
    define(module, "check", "names lists written",
           "Raise what the kernels raise for lists that do not go together; None is an absent "
           "list.",
           &check);
    // With num_threads 0 a kernel checks its arguments and does nothing else; those of lists return
    // what they have read.
#define UPDATE(name, Scalars) define_update<Scalars>(module, #name, &cpu::name, &cuda::name);
    EIGENFILTER_UPDATES(UPDATE)
#undef UPDATE
    define(module, "norm", "tensors out weights grad_scale num_threads",
           R"(Euclidean norm of all elements of all tensors, or of their products with weights.

    out <- sqrt(sum_i sum_j (w_i[j] t_i[j])^2) / grad_scale)",
           &norm);
    define(module, "flag_nonfinite", "tensors found_inf num_threads",
           R"(Set a flag where any element is infinite or NaN.

    found_inf <- 1 if some t_i[j] is not finite, else unchanged)",
           &flag_nonfinite);
    // Of vectors without elements the following write nothing: results are to be zero before.
    define(module, "orthogonalize", "w basis coefficients norms passes num_threads",
           R"(Orthogonalize vectors w in place against the rows of a basis Q, `passes` times.

    c <- c + Q w,  w <- w - Q^T (Q w)    (c = 0 at first);    norms <- ||w||)",
           &orthogonalize);
    define(module, "row_dots", "q w sums num_threads",
           R"(Inner products of vectors, and squared norms of the second ones.

    s_0i <- q_i . w_i,  s_1i <- w_i . w_i)",
           &row_dots);
    define(module, "lanczos_step", "u q w factors sums num_threads",
           R"(Take one step of many Lanczos recurrences.

    u_i <- f_0i w_i + f_1i q_i + f_2i u_i,  s_0i <- u_i . u_i,  s_1i <- u_i . q_i)",
           &lanczos_step);
    define(module, "gram", "vectors out num_threads",
           R"(Gram matrix of a few vectors.

    G_ij <- v_i . v_j)",
           &gram);
    define(module, "mix_rows", "vectors factors num_threads",
           R"(Multiply a few vectors by a lower triangular matrix in place.

    v_i <- sum_{j <= i} F_ij v_j)",
           &mix_rows);
}

}  // namespace eigenfilter
