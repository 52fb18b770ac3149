// How the memory of torch's tensors is found. The tests put another file in the place of
// exchange.cpp, one that says that tensors lie on a GPU (tests/cuda_on_cpu).
#pragma once

#include "dlpack.hpp"

namespace eigenfilter {

// torch's exchange API, or one in its place.
const dlpack::ExchangeApi* exchange_api(const dlpack::ExchangeApi* torchs);

// torch's name for the device type of the CUDA kernels.
extern const char* const kCudaDeviceType;

// As long as one lives, tensors that were borrowed are used.
class Borrowing {
 public:
    Borrowing();
    ~Borrowing();
    Borrowing(const Borrowing&) = delete;
    Borrowing& operator=(const Borrowing&) = delete;
};

}  // namespace eigenfilter
