// The error taxonomy of the pools. Every message carries the values and what would be right.
// One exception class a kind of fault; the bindings turn each into the Python class of the same name.
#pragma once

#include <stdexcept>
#include <string>

#include "base/status.h"
#include "base/units.h"

namespace elastikv {

class VmmError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// A driver call failed for a reason that no other class names.
class CudaError : public VmmError {
  public:
    CudaError(Status status, const std::string& doing);
    Status status;
};

class MappingFailed : public VmmError {
  public:
    MappingFailed(Status status, ByteRange range);
    explicit MappingFailed(const std::string& message) : VmmError(message) {}
};

class UnmappingFailed : public VmmError {
  public:
    UnmappingFailed(Status status, ByteRange range);
};

class OutOfVirtualMemory : public VmmError {
  public:
    OutOfVirtualMemory(Bytes requested, const std::string& why);
    Bytes requested;
};

class OutOfPhysicalMemory : public VmmError {
  public:
    // `who` says who holds what, and may be empty.
    OutOfPhysicalMemory(Bytes requested, Bytes available, const std::string& who);
    Bytes requested;
    Bytes available;
};

class InvalidOffset : public VmmError {
  public:
    InvalidOffset(Bytes offset, Bytes size, Bytes capacity);
    Bytes offset;
    Bytes size;
    Bytes capacity;
};

class InvalidSize : public VmmError {
  public:
    using VmmError::VmmError;
};

class InvalidAlignment : public VmmError {
  public:
    using VmmError::VmmError;
};

class InvalidPageSize : public VmmError {
  public:
    InvalidPageSize(Bytes page_size, Bytes granularity);
};

class InvalidArgument : public VmmError {
  public:
    using VmmError::VmmError;
};

class AlreadyMapped : public VmmError {
  public:
    AlreadyMapped(ByteRange wanted, ByteRange held);
};

class NotMapped : public VmmError {
  public:
    NotMapped(ByteRange wanted, Bytes first_hole);
};

class ModelNotFound : public VmmError {
  public:
    ModelNotFound(const std::string& id, const std::string& hint);
};

class ModelAlreadyExists : public VmmError {
  public:
    explicit ModelAlreadyExists(const std::string& id);
};

// Used while its memory is paused.
class ModelPaused : public VmmError {
  public:
    using VmmError::VmmError;
};

// A wait for memory that was called off.
class WaitCancelled : public VmmError {
  public:
    using VmmError::VmmError;
};

// A ledger that processes share can't be used: it is damaged, of another version or user, full, or not there.
class LedgerError : public VmmError {
  public:
    using VmmError::VmmError;
};

// No driver, no such device, or a device that lacks what the pool needs.
class DeviceUnavailable : public VmmError {
  public:
    using VmmError::VmmError;
};

// Memory of another process can't be had: it has exited, does not answer, or has taken the memory back.
class HandoffFailed : public VmmError {
  public:
    using VmmError::VmmError;
};

// Used after close(), or in a process forked from the one that made the pool.
class PoolClosed : public VmmError {
  public:
    using VmmError::VmmError;
};

// "1.5 GiB (1610612736 bytes)"
std::string format_bytes(Bytes bytes);
std::string describe(Status status);

}  // namespace elastikv
