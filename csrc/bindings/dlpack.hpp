// The part of the DLPack 1.x ABI that is used here: borrowing tensors through the C exchange API,
// the capsule `type(tensor).__dlpack_c_exchange_api__`. https://dmlc.github.io/dlpack
#pragma once

#include <cstdint>

namespace eigenfilter::dlpack {

enum DeviceType : std::int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3, kROCM = 10 };
enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

struct Device {
    std::int32_t type;
    std::int32_t id;
};

struct DataType {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    std::int32_t ndim;
    DataType dtype;
    std::int64_t* shape;    // [ndim]
    std::int64_t* strides;  // [ndim], in elements
    std::uint64_t byte_offset;
};

struct Managed {
    struct {
        std::uint32_t major, minor;
    } version;
    void* context;
    void (*deleter)(Managed* self);
    std::uint64_t flags;
    Tensor tensor;
};

struct ExchangeHeader {
    std::uint32_t major, minor;
    ExchangeHeader* previous;
};

struct ExchangeApi {
    ExchangeHeader header;
    void* managed_tensor_allocator;
    // Takes a reference of its own, which the deleter gives back.
    int (*managed_tensor_from_py_object)(void* object, Managed** out);
    void* managed_tensor_to_py_object;
    // Borrows: valid while the object lives. 0 on success, else a Python error is set.
    int (*tensor_from_py_object)(void* object, Tensor* out);
    int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** stream);
};

}  // namespace eigenfilter::dlpack
