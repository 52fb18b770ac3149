#include "exchange.hpp"

namespace eigenfilter {

const dlpack::ExchangeApi* exchange_api(const dlpack::ExchangeApi* torchs) { return torchs; }

const char* const kCudaDeviceType = "cuda";

Borrowing::Borrowing() = default;
Borrowing::~Borrowing() = default;

}  // namespace eigenfilter
