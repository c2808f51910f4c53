// The arithmetic of ranges, above all where it would wrap around, and the messages of the errors.
#include "base/error.h"
#include "base/units.h"
#include "catch.h"

namespace elastikv {
namespace {

constexpr Bytes top = ~Bytes{0};

TEST_CASE("a range that would pass 2^64 is none", "[units]") {
    CHECK(range_of(0, top) == ByteRange{0, top});
    CHECK(range_of(top, 0) == ByteRange{top, top});
    CHECK_FALSE(range_of(1, top).has_value());
    CHECK_FALSE(range_of(top, 1).has_value());
    CHECK_FALSE(range_of(top - 4095, 4096).has_value());
    CHECK(range_of(top - 4096, 4096) == ByteRange{top - 4096, top});
}

TEST_CASE("rounding up that would pass 2^64 gives none", "[units]") {
    CHECK(align_up(0, 4096) == Bytes{0});
    CHECK(align_up(1, 4096) == Bytes{4096});
    CHECK(align_up(4096, 4096) == Bytes{4096});
    CHECK(align_up(top - 4095, 4096) == top - 4095);
    CHECK_FALSE(align_up(top - 4094, 4096).has_value());
    CHECK_FALSE(align_up(top, 2).has_value());
    CHECK(align_down(8191, 4096) == 4096);
}

TEST_CASE("ranges contain, overlap and are clipped", "[units]") {
    const ByteRange range{10, 20};
    CHECK(range.size() == 10);
    CHECK(range.contains({10, 20}));
    CHECK_FALSE(range.contains({9, 20}));
    CHECK(range.overlaps({19, 30}));
    CHECK_FALSE(range.overlaps({20, 30}));
    CHECK(range.clipped_to({0, 15}) == ByteRange{10, 15});
    CHECK(range.clipped_to({30, 40}).empty());
    CHECK(range.clipped_to({0, 5}).empty());
    CHECK(align_outward({4095, 4097}, 4096) == ByteRange{0, 8192});
    CHECK(align_outward({4096, 8192}, 4096) == ByteRange{4096, 8192});
}

TEST_CASE("bytes are told in the largest unit and exactly", "[units]") {
    CHECK(format_bytes(0) == "0 bytes");
    CHECK(format_bytes(1023) == "1023 bytes");
    CHECK(format_bytes(GiB + GiB / 2) == "1.5 GiB (1610612736 bytes)");
    CHECK(format_bytes(top) == "16 EiB (18446744073709551615 bytes)");
}

TEST_CASE("errors carry their values and name them", "[errors]") {
    using Catch::Matchers::ContainsSubstring;
    const OutOfPhysicalMemory memory(2 * MiB, MiB, "'chat' holds it");
    CHECK(memory.requested == 2 * MiB);
    CHECK(memory.available == MiB);
    CHECK_THAT(memory.what(), ContainsSubstring("2 MiB") && ContainsSubstring("1 MiB") && ContainsSubstring("'chat'"));
    const InvalidOffset offset(5, 6, 10);
    CHECK(offset.offset == 5);
    CHECK(offset.size == 6);
    CHECK(offset.capacity == 10);
    CHECK_THAT(offset.what(), ContainsSubstring("5") && ContainsSubstring("6") && ContainsSubstring("10 bytes"));
    CHECK_THAT(NotMapped({0, 8}, 3).what(), ContainsSubstring("[0, 8)") && ContainsSubstring("byte 3"));
    CHECK_THAT(AlreadyMapped({0, 8}, {4, 12}).what(), ContainsSubstring("[0, 8)") && ContainsSubstring("[4, 12)"));
    const CudaError driver({StatusCode::failed, DriverCall::create, 719}, "making an extent");
    CHECK(driver.status.native == 719);
    CHECK_THAT(driver.what(), ContainsSubstring("create") && ContainsSubstring("719"));
}

TEST_CASE("every call and every status has a name", "[errors]") {
    for (int call = 0; call < driver_call_kinds; ++call) {
        CHECK(std::string(name_of(static_cast<DriverCall>(call))) != "unknown call");
    }
    CHECK(std::string(name_of(static_cast<DriverCall>(driver_call_kinds))) == "unknown call");
    for (int code = 0; code <= static_cast<int>(StatusCode::failed); ++code) {
        CHECK(std::string(name_of(static_cast<StatusCode>(code))) != "unknown status");
    }
}

}  // namespace
}  // namespace elastikv
