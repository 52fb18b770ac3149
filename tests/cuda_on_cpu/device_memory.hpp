// The memory of the emulated GPU.
//
// It lies below the host's by a fixed distance, so that what is apart, or shared, or aligned on the
// host is so on the device. Pages are there only as long as a call needs them, and open only while
// a launch runs. What lies in a page beside the tensors is NaN, and must be so after a launch; the
// address sanitizer forbids even to read it.
#pragma once

#include "emulator.hpp"

namespace emulator::device_memory {

// Begins and ends a launch: pages become readable and writable, and nothing again.
void open();
void close(At launch);

// Whether an address is in pages of the device.
bool has(const void* address);

}  // namespace emulator::device_memory
