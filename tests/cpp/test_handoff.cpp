// Descriptors and memory from one process to another: the broker, fetch, ImportedMemory, and a pool's part in it.
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <atomic>
#include <thread>

#include "shared/handoff.h"
#include "shared/imported_memory.h"
#include "support/child.h"
#include "support/each_failure.h"

namespace elastikv::testing {
namespace {

#ifdef __SANITIZE_THREAD__
constexpr bool child_may_start_threads = false;  // the thread sanitizer ends a forked child that does
#else
constexpr bool child_may_start_threads = true;
#endif

ino_t file_of(int fd) {
    struct stat facts {};
    REQUIRE(fstat(fd, &facts) == 0);
    return facts.st_ino;
}

// A fresh file each, so that they can be told apart.
std::vector<UniqueFd> files(std::size_t count) {
    std::vector<UniqueFd> made;
    for (std::size_t i = 0; i < count; ++i) {
        int ends[2];
        REQUIRE(pipe(ends) == 0);
        close(ends[1]);
        made.emplace_back(ends[0]);
    }
    return made;
}

std::string why_not(const HandoffAddress& address) {
    try {
        (void)fetch(address);
    } catch (const HandoffFailed& error) {
        return error.what();
    }
    return {};
}

std::vector<ImportedMemory::Part> parts_of(std::vector<ExportedExtent> extents) {
    std::vector<ImportedMemory::Part> parts;
    for (ExportedExtent& extent : extents) parts.push_back({std::move(extent.fd), extent.range.size()});
    return parts;
}

// Three extents with different bytes, at pages 4 to 9.
void prepare(PoolFixture& at) {
    at.pool->allocate(4 * at.page, at.page);
    at.pool->allocate(5 * at.page, 3 * at.page);
    at.pool->allocate(8 * at.page, 2 * at.page);
    at.stamp(4 * at.page, at.page, 1);
    at.stamp(5 * at.page, 3 * at.page, 2);
    at.stamp(8 * at.page, 2 * at.page, 3);
}

bool has_content(PoolFixture& at) {
    return at.holds(4 * at.page, at.page, 1) && at.holds(5 * at.page, 3 * at.page, 2) &&
           at.holds(8 * at.page, 2 * at.page, 3);
}

TEST_CASE("descriptors are fetched in order, also more than fit one message", "[handoff]") {
    for (const std::size_t count : {std::size_t{1}, std::size_t{64}, std::size_t{150}}) {
        std::vector<UniqueFd> sent = files(count);
        std::vector<ino_t> expected;
        for (const UniqueFd& fd : sent) expected.push_back(file_of(fd.get()));
        const FdBroker::Registration registration = FdBroker::of_this_process().add(std::move(sent));
        for (int round = 0; round < 2; ++round) {
            std::vector<ino_t> got;
            for (const UniqueFd& fd : fetch(registration.address())) got.push_back(file_of(fd.get()));
            CHECK(got == expected);
        }
    }
}

TEST_CASE("what is withdrawn or was never registered is not served", "[handoff]") {
    FdBroker::Registration registration = FdBroker::of_this_process().add(files(1));
    HandoffAddress guess = registration.address();
    guess.key[3] ^= 1;
    CHECK_THAT(why_not(guess), Catch::Matchers::ContainsSubstring("taken it back"));
    const HandoffAddress known = registration.address();
    CHECK(why_not(known).empty());
    registration = {};
    CHECK_THAT(why_not(known), Catch::Matchers::ContainsSubstring("taken it back"));
    CHECK_THROWS_AS(FdBroker::of_this_process().add({}), InvalidArgument);
    HandoffAddress nobody = known;
    nobody.socket += "x";
    CHECK_THAT(why_not(nobody), Catch::Matchers::ContainsSubstring("is gone"));
    nobody.socket.clear();
    CHECK_FALSE(why_not(nobody).empty());
}

TEST_CASE("clients that say nothing, or nonsense, hold nobody up", "[handoff]") {
    const FdBroker::Registration registration = FdBroker::of_this_process().add(files(2));
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    const std::string& text = registration.address().socket;
    text.copy(name.sun_path + 1, text.size());
    const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
    std::vector<UniqueFd> clients;
    for (int i = 0; i < 8; ++i) {
        clients.emplace_back(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
        REQUIRE(connect(clients.back().get(), reinterpret_cast<sockaddr*>(&name), size) == 0);
        if (i % 2 == 0) REQUIRE(send(clients.back().get(), "nonsense", 8, MSG_NOSIGNAL) == 8);
    }
    CHECK(fetch(registration.address()).size() == 2);
    char byte = 0;
    CHECK(recv(clients[0].get(), &byte, 1, 0) == 0);  // shown the door
}

TEST_CASE("many threads fetch while sets come and go", "[handoff][threads]") {
    const FdBroker::Registration lasting = FdBroker::of_this_process().add(files(3));
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
        threads.emplace_back([&, t] {
            for (int round = 0; round < 25; ++round) {
                if (t % 2 == 0) {
                    wrong += fetch(lasting.address()).size() == 3 ? 0 : 1;
                } else {
                    int ends[2];
                    if (pipe(ends) != 0) continue;
                    close(ends[1]);
                    std::vector<UniqueFd> one;
                    one.emplace_back(ends[0]);
                    const FdBroker::Registration mine = FdBroker::of_this_process().add(std::move(one));
                    wrong += fetch(mine.address()).size() == 1 ? 0 : 1;
                }
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong == 0);
}

TEST_CASE("a forked child fetches from its parent, and serves only what it registers itself", "[handoff][fork]") {
    FdBroker::Registration registration = FdBroker::of_this_process().add(files(2));
    CHECK(in_child([&] {
              if (fetch(registration.address()).size() != 2) return 1;
              registration = {};  // is the parent's to withdraw
              if (!child_may_start_threads) return 0;
              const FdBroker::Registration own = FdBroker::of_this_process().add(files(1));
              if (own.address().socket == registration.address().socket) return 2;
              return fetch(own.address()).size() == 1 ? 0 : 3;
          }) == 0);
    CHECK(fetch(registration.address()).size() == 2);
}

TEST_CASE("an exporter that has ended is gone at once, also where a child of its own lives on", "[handoff][fork]") {
    if (!child_may_start_threads) return;
    int ends[2];
    REQUIRE(pipe(ends) == 0);
    int alive[2];
    REQUIRE(pipe(alive) == 0);
    CHECK(in_child([&] {
              const FdBroker::Registration own = FdBroker::of_this_process().add(files(1));
              if (fork() == 0) {
                  close(alive[1]);
                  char byte = 0;
                  (void)!::read(alive[0], &byte, 1);  // until the test lets go
                  _exit(0);
              }
              const std::string& name = own.address().socket;
              if (::write(ends[1], name.data(), name.size()) != static_cast<ssize_t>(name.size())) return 1;
              return 0;
          }) == 0);
    char name[108] = {};
    REQUIRE(::read(ends[0], name, sizeof name - 1) > 0);
    CHECK_THAT(why_not({name, {}}), Catch::Matchers::ContainsSubstring("is gone"));
    for (const int fd : {ends[0], ends[1], alive[0], alive[1]}) close(fd);
}

TEST_CASE("a pool's extents are mapped in another process, behind each other", "[handoff][fork][pool]") {
    PoolFixture at;
    prepare(at);
    std::vector<ExportedExtent> extents = at.pool->export_extents(4 * at.page + 1, 6 * at.page - 2);
    REQUIRE(extents.size() == 3);
    CHECK(extents[0].range == ByteRange{4 * at.page, 5 * at.page});
    CHECK(extents[1].range == ByteRange{5 * at.page, 8 * at.page});
    CHECK(extents[2].range == ByteRange{8 * at.page, 10 * at.page});
    std::vector<UniqueFd> descriptors;
    for (ExportedExtent& extent : extents) descriptors.push_back(std::move(extent.fd));
    const FdBroker::Registration registration = FdBroker::of_this_process().add(std::move(descriptors));
    CHECK(in_child([&] {
              const auto own = std::make_shared<HostDriver>();
              {
                  std::vector<ImportedMemory::Part> parts;
                  for (UniqueFd& fd : fetch(registration.address())) {
                      parts.push_back({std::move(fd), extents[parts.size()].range.size()});
                  }
                  const ImportedMemory memory(own, parts);
                  const Capabilities& device = own->capabilities();
                  if (memory.size() != 6 * at.page) return 1;
                  if (!all_bytes_are(device, memory.base(), at.page, 1)) return 2;
                  if (!all_bytes_are(device, memory.base() + at.page, 3 * at.page, 2)) return 3;
                  if (!all_bytes_are(device, memory.base() + 4 * at.page, 2 * at.page, 3)) return 4;
                  fill(device, memory.base() + 2 * at.page, at.page, 9);
              }
              return own->live_extents() + own->live_mappings() + own->live_reservations() == 0 ? 0 : 5;
          }) == 0);
    CHECK(at.holds(5 * at.page, at.page, 2));
    CHECK(at.holds(6 * at.page, at.page, 9));
    CHECK(at.holds(7 * at.page, at.page, 2));
    at.require_sound();
    at.finish();
}

TEST_CASE("only what is wholly allocated is exported", "[handoff][pool]") {
    PoolFixture at;
    prepare(at);
    CHECK_THROWS_AS(at.pool->export_extents(3 * at.page, 2 * at.page), NotMapped);
    CHECK_THROWS_AS(at.pool->export_extents(9 * at.page, 2 * at.page), NotMapped);
    CHECK_THROWS_AS(at.pool->export_extents(0, 0), InvalidSize);
    CHECK_THROWS_AS(at.pool->export_extents(at.pool->capacity(), 1), InvalidOffset);
    CHECK(at.pool->export_extents(6 * at.page, 1).size() == 1);
    at.finish();
}

TEST_CASE("compaction leaves exported extents where they are", "[handoff][pool]") {
    PoolFixture at;
    at.pool->allocate(0, 4 * at.page);
    at.pool->allocate(8 * at.page, 4 * at.page);
    at.stamp(0, at.page, 5);
    at.stamp(8 * at.page, at.page, 6);
    const ImportedMemory memory(at.faults, parts_of(at.pool->export_extents(0, 4 * at.page)));
    at.pool->deallocate(at.page, 3 * at.page);
    at.pool->deallocate(9 * at.page, 3 * at.page);
    CHECK(at.pool->compact() == 3 * at.page);  // of the other extent
    fill(at.device(), memory.base(), at.page, 7);
    CHECK(at.holds(0, at.page, 7));
    CHECK(at.holds(8 * at.page, at.page, 6));
    at.require_sound();
}

TEST_CASE("an export that fails leaves the pool as it was", "[handoff][faults]") {
    Injection test;
    test.prepare = prepare;
    test.operation = [](PoolFixture& at) { (void)at.pool->export_extents(4 * at.page, 6 * at.page); };
    test.content = has_content;
    fail_each_call_both_ways(test, 3);
}

TEST_CASE("an import happens as a whole or not at all", "[handoff][faults]") {
    constexpr std::uint64_t sync_call = 11;  // behind a reservation, and import, map and access of three extents
    for (std::uint64_t n = 1;; ++n) {
        CAPTURE(n);
        PoolFixture at;
        prepare(at);
        std::vector<ImportedMemory::Part> parts = parts_of(at.pool->export_extents(4 * at.page, 6 * at.page));
        const auto own = std::make_shared<HostDriver>();
        const auto faults = std::make_shared<FaultDriver>(own);
        faults->fail_nth(n);
        const bool threw = throws<VmmError>([&] { const ImportedMemory memory(faults, parts); });
        const bool struck = faults->struck();
        faults->heal();
        const bool could_not_wait = !threw && struck && own->live_mappings() == 3;
        if (could_not_wait) {  // a later one gives its memory back
            const ImportedMemory later(faults, parts);
        }
        CHECK(could_not_wait == (n == sync_call));
        if (threw || could_not_wait) require_nothing_left(*own);
        CHECK(has_content(at));
        parts.clear();
        at.finish();
        if (!struck) {
            CHECK(n > sync_call);
            require_nothing_left(*own);
            return;
        }
    }
}

TEST_CASE("a pool allows its own device, and says what another can't have", "[handoff][pool]") {
    PoolFixture at;
    prepare(at);
    const std::uint64_t before = at.calls(DriverCall::set_access);
    at.pool->allow_peer(0);
    CHECK(at.calls(DriverCall::set_access) == before + 3);
    CHECK_THROWS_AS(at.pool->allow_peer(5), CudaError);
    CHECK_THROWS_AS(at.pool->allow_peer(-1), CudaError);
    CHECK(at.calls(DriverCall::set_access) == before + 3);
    at.faults->fail_nth(2, DriverCall::set_access);
    try {
        at.pool->allow_peer(0);
        FAIL("the driver refused one extent");
    } catch (const CudaError& error) {
        const std::string second = "[" + std::to_string(5 * at.page) + ", " + std::to_string(8 * at.page) + ")";
        CHECK_THAT(error.what(), Catch::Matchers::ContainsSubstring("but for " + second));
    }
    at.pool->allow_peer(0);
    CHECK(has_content(at));
    at.require_sound();
    at.finish();
}

}  // namespace
}  // namespace elastikv::testing
