// A ledger counts the memory of one physical device, whatever its number in a process.
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>

#include "driver/forwarding_driver.h"
#include "shared/ledger_table.h"
#include "shared/ledger_view.h"
#include "shared/shared_memory_pool.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

using Catch::Matchers::ContainsSubstring;

const Bytes page = 4096;

// What a GPU is in a process that sees another one, or the same ones in another order.
class OtherDevice : public ForwardingDriver {
  public:
    OtherDevice() : ForwardingDriver(host_driver()), mine_(host_driver()->capabilities()) { mine_.uuid = {7, 9}; }
    const Capabilities& capabilities() const noexcept override { return mine_; }

  private:
    Status forward(DriverCall, Forwarded& go) noexcept override { return go(); }

    Capabilities mine_;
};

std::string fresh_name(const char* of) { return std::string("test-") + of + "-" + std::to_string(getpid()); }
std::string file_of(const std::string& name) { return "/dev/shm/elastikv-" + std::to_string(geteuid()) + "-" + name; }

TEST_CASE("a ledger's name on two devices is refused in words", "[ledger][device][bad_input]") {
    const std::string name = fresh_name("device");
    const auto other = std::make_shared<OtherDevice>();
    {
        const SharedMemoryPool pool(16 * page, host_driver(), {}, name);
        CHECK_THROWS_WITH(SharedMemoryPool(16 * page, other, {}, name), ContainsSubstring("another device"));
        CHECK(LedgerView(name).stats().processes == 1);
        CHECK(LedgerView(name).device() == "cpu");
        const SharedMemoryPool same(16 * page, host_driver(), {}, name);
    }
    const SharedMemoryPool pool(16 * page, other, {}, name);
    CHECK_THROWS_WITH(SharedMemoryPool(16 * page, host_driver(), {}, name), ContainsSubstring("another name"));
}

TEST_CASE("a ledger that dead processes left goes to the device that comes", "[ledger][device]") {
    const std::string name = fresh_name("alive");
    const std::string left = fresh_name("left");
    const auto other = std::make_shared<OtherDevice>();
    std::string whole;
    {
        const SharedMemoryPool pool(16 * page, other, {}, name);
        std::ifstream in(file_of(name), std::ios::binary);
        whole.assign(std::istreambuf_iterator<char>(in), {});
    }
    whole[offsetof(LedgerTable, member) + offsetof(LedgerMember, state)] = entry_free;
    std::ofstream(file_of(left), std::ios::binary) << whole;
    {
        const SharedMemoryPool taken(16 * page, host_driver(), {}, left);
        CHECK_THROWS_WITH(SharedMemoryPool(16 * page, other, {}, left), ContainsSubstring("another device"));
    }
    CHECK_FALSE(std::filesystem::exists(file_of(left)));
}

}  // namespace
}  // namespace elastikv::testing
