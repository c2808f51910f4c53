// Our exceptions to the Python classes of the same names, which elastikv/errors.py defines.
#include "bindings/bindings.h"

namespace elastikv::bindings {
namespace {

template <typename... Attributes>
void raise(const char* name, const VmmError& error, const Attributes&... attributes) {
    const py::object type = py::module_::import("elastikv.errors").attr(name);
    const py::object value = type(error.what());
    (py::setattr(value, attributes.first, py::cast(attributes.second)), ...);
    PyErr_SetObject(type.ptr(), value.ptr());
}

using Number = std::pair<const char*, Bytes>;
using Code = std::pair<const char*, int>;

}  // namespace

void bind_errors(py::module_&) {
    py::register_local_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const OutOfPhysicalMemory& e) {
            raise("OutOfPhysicalMemory", e, Number{"requested", e.requested}, Number{"available", e.available});
        } catch (const OutOfVirtualMemory& e) {
            raise("OutOfVirtualMemory", e, Number{"requested", e.requested});
        } catch (const InvalidOffset& e) {
            raise("InvalidOffset", e, Number{"offset", e.offset}, Number{"size", e.size},
                  Number{"capacity", e.capacity});
        } catch (const CudaError& e) {
            raise("CudaError", e, Code{"code", e.status.native});
        } catch (const MappingFailed& e) {
            raise("MappingFailed", e);
        } catch (const UnmappingFailed& e) {
            raise("UnmappingFailed", e);
        } catch (const InvalidSize& e) {
            raise("InvalidSize", e);
        } catch (const InvalidAlignment& e) {
            raise("InvalidAlignment", e);
        } catch (const InvalidPageSize& e) {
            raise("InvalidPageSize", e);
        } catch (const InvalidArgument& e) {
            raise("InvalidArgument", e);
        } catch (const AlreadyMapped& e) {
            raise("AlreadyMapped", e);
        } catch (const NotMapped& e) {
            raise("NotMapped", e);
        } catch (const ModelNotFound& e) {
            raise("ModelNotFound", e);
        } catch (const ModelAlreadyExists& e) {
            raise("ModelAlreadyExists", e);
        } catch (const ModelPaused& e) {
            raise("ModelPaused", e);
        } catch (const WaitCancelled& e) {
            raise("WaitCancelled", e);
        } catch (const LedgerError& e) {
            raise("LedgerError", e);
        } catch (const DeviceUnavailable& e) {
            raise("DeviceUnavailable", e);
        } catch (const HandoffFailed& e) {
            raise("HandoffFailed", e);
        } catch (const PoolClosed& e) {
            raise("PoolClosed", e);
        } catch (const VmmError& e) {
            raise("VmmError", e);
        }
    });
}

}  // namespace elastikv::bindings
