// A range of a model's memory, mapped a second time by its handle.
#include "shared/range_export.h"
#include "shared/shared_memory_pool.h"
#include "support/child.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

using Catch::Matchers::ContainsSubstring;

struct ExportFixture {
    SharedMemoryPool shared{64 * MiB, host_driver()};
    ModelPtr model = shared.register_model("chat", 64 * MiB);
    Bytes page = shared.page_size();
};

TEST_CASE("a range is seen at a second address, and written through it unless it is read-only", "[export]") {
    ExportFixture at;
    const Address first = at.model->allocate(2 * at.page);
    at.model->allocate(2 * at.page);  // another extent, right behind
    const Capabilities& host = at.model->pool().device();
    fill(host, first, 4 * at.page, 0x31);
    const Bytes begin = at.page / 2;
    for (const bool read_only : {true, false}) {
        CAPTURE(read_only);
        const RangeExport exported(at.model, begin, 3 * at.page, read_only);
        const ImportedRange range = import_range(exported.handle());
        CHECK(range.size == 3 * at.page);
        CHECK(range.read_only == read_only);
        CHECK(range.address() % at.page == begin);
        CHECK(all_bytes_are(host, range.address(), range.size, 0x31));
        fill(host, first + begin + range.size - 1, 1, 0x32);
        CHECK(all_bytes_are(host, range.address() + range.size - 1, 1, 0x32));
        fill(host, first + begin + range.size - 1, 1, 0x31);
        CHECK(touch_faults(range.address()) == read_only);
    }
    CHECK(all_bytes_are(host, first + begin, 1, 1));  // what the child wrote through the second one
}

TEST_CASE("a range can be fetched while its export lives, and used for longer", "[export]") {
    ExportFixture at;
    const Address address = at.model->allocate(at.page);
    fill(at.model->pool().device(), address, at.page, 0x33);
    std::string handle;
    ImportedRange range;
    {
        const RangeExport exported(at.model, 0, at.page, false);
        handle = exported.handle();
        range = import_range(handle);
    }
    CHECK_THROWS_AS(import_range(handle), HandoffFailed);
    at.model->deallocate(0, at.page);
    at.shared.trim();
    CHECK(all_bytes_are(at.model->pool().device(), range.address(), at.page, 0x33));
}

TEST_CASE("what is not allocated can't be exported, and what is no handle not imported", "[export][bad_input]") {
    ExportFixture at;
    at.model->allocate(at.page);
    CHECK_THROWS_AS(RangeExport(at.model, 0, 2 * at.page, false), NotMapped);
    CHECK_THROWS_AS(RangeExport(at.model, 0, 0, false), InvalidSize);
    CHECK_THROWS_AS(RangeExport(at.model, 64 * MiB, 1, false), InvalidOffset);
    const std::string good = RangeExport(at.model, 1, 2, false).handle();
    for (const std::string& bad : {std::string(), std::string("elastikv-range-1"),
                                   std::string("elastikv-range-1:x:0:1:"), "elastikv-range-2" + good.substr(16),
                                   good.substr(0, 25), "elastikv-range-1:rw:1:99999999" + good.substr(23)}) {
        CHECK_THROWS_AS(import_range(bad), InvalidArgument);
    }
    CHECK_THROWS_WITH(import_range("torch's"), ContainsSubstring("is no handle"));
}

}  // namespace
}  // namespace elastikv::testing
