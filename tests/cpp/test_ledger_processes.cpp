// One ledger, several processes: joining, dying, pressing each other, being looked at from outside.
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <thread>

#include "shared/ledger_segment.h"
#include "shared/ledger_view.h"
#include "shared/shared_memory_pool.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

using Catch::Matchers::ContainsSubstring;

// A process that does something and then waits to be let go or killed. To be made before this one has threads, as the
// thread sanitizer does not let a child of a process with threads have any.
class Other {
  public:
    explicit Other(std::function<void(Other&)> body) {
        int to_child[2];
        int to_parent[2];
        REQUIRE(pipe(to_child) == 0);
        REQUIRE(pipe(to_parent) == 0);
        std::fflush(nullptr);
        pid_ = fork();
        if (pid_ == 0) {
            read_ = UniqueFd(to_child[0]);
            write_ = UniqueFd(to_parent[1]);
            close(to_child[1]);
            close(to_parent[0]);
            alarm(120);  // only so that a child that hangs ends
            try {
                await();  // until the parent says so
                body(*this);
                _exit(0);
            } catch (...) {
                _exit(99);
            }
        }
        read_ = UniqueFd(to_parent[0]);
        write_ = UniqueFd(to_child[1]);
        close(to_child[0]);
        close(to_parent[1]);
    }
    ~Other() {
        if (pid_ > 0) end();
    }

    // A turn of the other one, and back.
    void turn() {
        tell();
        await();
    }
    void tell() const { (void)!::write(write_.get(), "x", 1); }
    void await() const {
        char byte = 0;
        if (::read(read_.get(), &byte, 1) != 1) _exit(98);
    }
    void end() {
        kill(pid_, SIGKILL);
        waitpid(pid_, nullptr, 0);
        pid_ = 0;
    }
    pid_t pid() const { return pid_; }

  private:
    pid_t pid_ = 0;
    UniqueFd read_;
    UniqueFd write_;
};

std::string fresh_name(const char* of) { return std::string("test-") + of + "-" + std::to_string(getpid()); }

// Removes the ledger of a test whose last process was killed.
struct Sweep {
    ~Sweep() { (void)LedgerView::names(); }
};

std::string file_of(const std::string& name) { return "/dev/shm/elastikv-" + std::to_string(geteuid()) + "-" + name; }

bool exists(const std::string& name) { return std::filesystem::exists(file_of(name)); }

constexpr Bytes mib = MiB;
const Bytes page = 4096;

TEST_CASE("pools of one name share one limit, and the last one removes the ledger", "[ledger][processes]") {
    const std::string name = fresh_name("share");
    const auto host = std::make_shared<HostDriver>();
    {
        SharedMemoryPool one(8 * page, host, {}, name);
        struct stat status {};
        REQUIRE(stat(file_of(name).c_str(), &status) == 0);
        CHECK((status.st_mode & 0777) == 0600);
        {
            SharedMemoryPool two(8 * page, host, {}, name);
            CHECK(two.name() == name);
            const ModelPtr first = one.register_model("model", mib);
            const ModelPtr second = two.register_model("model", mib);
            first->allocate(5 * page);
            CHECK_THROWS_WITH(second->allocate(4 * page),
                              ContainsSubstring("process " + std::to_string(getpid()) + ": 'model' 20 KiB"));
            second->allocate(3 * page);
            CHECK(one.global_stats().physical_usage == 8 * page);
            CHECK_THROWS_AS(SharedMemoryPool(9 * page, host, {}, name), InvalidArgument);
            CHECK_THROWS_WITH(SharedMemoryPool(9 * page, host, {}, name), ContainsSubstring("36 KiB"));
        }
        CHECK(one.global_stats().physical_usage == 5 * page);
        CHECK(exists(name));
        CHECK(LedgerView(name).stats().processes == 1);
    }
    CHECK_FALSE(exists(name));
    require_nothing_left(*host);
}

TEST_CASE("a model's handle keeps its charge in the ledger after its pool is gone", "[ledger][processes]") {
    const std::string name = fresh_name("handle");
    const auto host = std::make_shared<HostDriver>();
    ModelPtr model;
    {
        SharedMemoryPool pool(8 * page, host, {}, name);
        model = pool.register_model("model", mib);
        model->allocate(page);
    }
    CHECK(LedgerView(name).stats().charged == page);
    model.reset();
    CHECK_FALSE(exists(name));
}

TEST_CASE("invariant 9: a killed process leaves no charge, no reserve and no waiter",
          "[ledger][processes][invariant]") {
    const Sweep sweep;
    const std::string name = fresh_name("killed");
    Other other([&](Other& parent) {
        SharedMemoryPool pool(16 * page, host_driver(), {}, name);
        const ModelPtr model = pool.register_model("dying", mib, std::nullopt, {.reserve = 4 * page});
        model->allocate(10 * page);
        std::thread waiting([&] {
            const WaitOptions wait{std::chrono::steady_clock::now() + std::chrono::minutes(5), nullptr, {}};
            AllocateOptions options;
            options.wait = &wait;
            model->allocate(7 * page, options);
        });
        while (model->quota().waiters == 0) std::this_thread::yield();
        parent.turn();
    });
    other.turn();
    SharedMemoryPool pool(16 * page, host_driver(), {}, name);
    const ModelPtr model = pool.register_model("living", mib);
    CHECK(pool.global_stats().physical_usage == 10 * page);
    CHECK(pool.global_stats().reserved == 4 * page);
    CHECK_THROWS_AS(model->allocate(7 * page), OutOfPhysicalMemory);
    other.end();
    model->allocate(16 * page);
    const LedgerStats stats = LedgerView(name).stats();
    CHECK(stats.charged == 16 * page);
    CHECK(stats.reserved == 0);
    CHECK(stats.processes == 1);
    CHECK(stats.waiters == 0);
}

TEST_CASE("who waits gets the memory of a process that dies", "[ledger][processes][wait]") {
    const Sweep sweep;
    const std::string name = fresh_name("heir");
    Other other([&](Other& parent) {
        SharedMemoryPool pool(16 * page, host_driver(), {}, name);
        pool.register_model("dying", mib)->allocate(16 * page);
        parent.turn();
    });
    other.turn();
    SharedMemoryPool pool(16 * page, host_driver(), {}, name);
    const ModelPtr model = pool.register_model("living", mib);
    std::thread killing([&] {
        while (model->quota().waiters == 0) std::this_thread::yield();
        other.end();
    });
    const WaitOptions wait{std::chrono::steady_clock::now() + std::chrono::minutes(5), nullptr, {}};
    AllocateOptions options;
    options.wait = &wait;
    model->allocate(16 * page, options);
    killing.join();
    CHECK(pool.global_stats().physical_usage == 16 * page);
}

TEST_CASE("idle memory of another process makes room, down to its reserve, and it grows again as before",
          "[ledger][processes][ladder]") {
    const Sweep sweep;
    const std::string name = fresh_name("idle");
    Other other([&](Other& parent) {
        SharedMemoryPool pool(16 * page, host_driver(), {.park_limit = mib}, name);
        const ModelPtr model = pool.register_model("idle", mib, std::nullopt, {.reserve = 4 * page});
        for (int i = 0; i < 16; ++i) model->allocate(page);
        model->deallocate(0, 16 * page);
        parent.turn();
        model->allocate(4 * page);  // its reserve
        parent.turn();
    });
    other.turn();
    SharedMemoryPool pool(16 * page, host_driver(), {}, name);
    const ModelPtr model = pool.register_model("busy", mib);
    model->allocate(2 * page);
    CHECK(LedgerView(name).clients(true).front().quota.charged == 14 * page);  // no more than was needed
    model->allocate(10 * page);
    CHECK_THROWS_AS(model->allocate(page), OutOfPhysicalMemory);
    other.turn();
    CHECK(pool.global_stats().physical_usage == 16 * page);
}

TEST_CASE("pressure callbacks of lower priority are called in other processes", "[ledger][processes][ladder]") {
    const Sweep sweep;
    const std::string name = fresh_name("pressure");
    Other other([&](Other& parent) {
        SharedMemoryPool pool(16 * page, host_driver(), {}, name);
        const ModelPtr low = pool.register_model("low", mib);
        const ModelPtr high = pool.register_model("high", mib, std::nullopt, {.priority = 9});
        for (int i = 0; i < 8; ++i) low->allocate(page);
        high->allocate(8 * page);
        low->account()->add_pressure_callback(
            [&](const PressureRequest& request) { low->deallocate(0, request.wanted); });
        high->account()->add_pressure_callback([&](const PressureRequest&) { high->deallocate(0, 8 * page); });
        parent.turn();
    });
    other.turn();
    SharedMemoryPool pool(16 * page, host_driver(), {}, name);
    const ModelPtr model = pool.register_model("asker", mib, std::nullopt, {.priority = 5});
    model->allocate(3 * page);
    CHECK_THROWS_AS(model->allocate(8 * page), OutOfPhysicalMemory);
    const LedgerView view(name);
    for (const LedgerClientStats& client : view.clients(false)) {
        if (client.model == "high") CHECK(client.quota.charged == 8 * page);
    }
}

TEST_CASE("a ledger is seen and steered from outside", "[ledger][processes][view]") {
    const Sweep sweep;
    const std::string name = fresh_name("view");
    Other other([&](Other& parent) {
        SharedMemoryPool pool(16 * page, host_driver(), {.park_limit = mib}, name);
        const ModelPtr model = pool.register_model("chat", mib, std::nullopt, {.priority = 2});
        model->allocate(6 * page);
        model->allocate(2 * page);
        model->deallocate(6 * page, 2 * page);
        parent.turn();
    });
    other.turn();
    const LedgerView view(name);
    CHECK(view.device() == "cpu");
    CHECK(view.stats().physical_limit == 16 * page);
    std::vector<LedgerClientStats> clients = view.clients(true);
    REQUIRE(clients.size() == 1);
    CHECK(clients[0].model == "chat");
    CHECK(clients[0].pid == static_cast<std::uint32_t>(other.pid()));
    CHECK(clients[0].started > 0);
    CHECK(clients[0].quota.priority == 2);
    CHECK(clients[0].quota.charged == 8 * page);
    CHECK(clients[0].used == 6 * page);
    CHECK(clients[0].parked == 2 * page);
    CHECK(clients[0].driver_calls > 0);
    CHECK(clients[0].age < 100);
    CHECK(view.trim("chat", std::nullopt) == 2 * page);
    view.set_quota("chat", std::nullopt, {.reserve = 2 * page, .limit = 4 * page, .priority = {}});
    clients = view.clients(false);
    CHECK(clients[0].quota.overage == 2 * page);
    CHECK_THROWS_AS(view.set_quota("chat", 1, {}), ModelNotFound);
    CHECK_THROWS_WITH(view.set_quota("chad", std::nullopt, {}), ContainsSubstring("'chat' of process"));
    CHECK_THROWS_AS(view.set_limit(page), InvalidArgument);
    view.set_limit(32 * page);
    CHECK(view.stats().physical_limit == 32 * page);
    const std::vector<std::string> names = LedgerView::names();
    CHECK(std::count(names.begin(), names.end(), name) == 1);

    SharedMemoryPool pool(32 * page, host_driver(), {}, name);
    pool.register_model("chat", mib);
    CHECK_THROWS_WITH(view.set_quota("chat", std::nullopt, {}), ContainsSubstring("several processes"));
    view.set_quota("chat", static_cast<std::uint32_t>(getpid()), {.reserve = {}, .limit = {}, .priority = 3});
    CHECK(pool.model("chat")->quota().priority == 3);
}

TEST_CASE("a forked child is no part of the ledger and leaves the parent's place alone", "[ledger][processes][fork]") {
    const std::string name = fresh_name("fork");
    auto pool = std::make_unique<SharedMemoryPool>(16 * page, host_driver(), PoolOptions{}, name);
    ModelPtr model = pool->register_model("chat", mib);
    model->allocate(4 * page);
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);
        const bool refused = throws<PoolClosed>([&] { model->allocate(page); });
        model.reset();
        pool.reset();
        _exit(refused ? 0 : 1);
    }
    int status = -1;
    REQUIRE(waitpid(child, &status, 0) == child);
    CHECK(status == 0);
    CHECK(LedgerView(name).stats().charged == 4 * page);
    model->allocate(4 * page);
    CHECK(pool->global_stats().physical_usage == 8 * page);
}

TEST_CASE("bad names and bad files are refused in words", "[ledger][processes][bad_input]") {
    const auto join = [](const std::string& name) { SharedMemoryPool(16 * page, host_driver(), {}, name); };
    for (const std::string& bad :
         {std::string("a/b"), std::string("sp ace"), std::string(64, 'x'), std::string("\n")}) {
        CHECK_THROWS_AS(join(bad), InvalidArgument);
        CHECK_THROWS_AS(LedgerView(bad), InvalidArgument);
    }
    CHECK_THROWS_AS(LedgerView(""), InvalidArgument);
    const std::string name = fresh_name("bad");
    CHECK_THROWS_WITH(LedgerView(name), ContainsSubstring("there is none of that name"));
    const std::string file = file_of(name);

    std::ofstream(file) << "short";
    CHECK_THROWS_WITH(join(name), ContainsSubstring("truncated"));
    std::ofstream(file) << std::string(4096, 'x');
    CHECK_THROWS_WITH(join(name), ContainsSubstring("not made by elastikv"));
    CHECK_THROWS_AS(LedgerView(name), LedgerError);
    std::filesystem::remove(file);

    std::string whole;
    {
        const SharedMemoryPool pool(16 * page, host_driver(), {}, name);
        std::ifstream in(file, std::ios::binary);
        whole.assign(std::istreambuf_iterator<char>(in), {});
    }
    const auto write = [&](const std::string& bytes) { std::ofstream(file, std::ios::binary) << bytes; };
    write(whole.substr(0, whole.size() / 2));
    CHECK_THROWS_WITH(join(name), ContainsSubstring("truncated"));
    std::string newer = whole;
    newer[offsetof(LedgerTable, version)] = 77;
    write(newer);
    CHECK_THROWS_WITH(join(name), ContainsSubstring("layout 77"));
    std::string cuda = whole;
    cuda[offsetof(LedgerTable, device_kind)] = 1;
    write(cuda);
    CHECK_THROWS_WITH(join(name), ContainsSubstring("another kind of device"));
    if (geteuid() == 0) {
        write(whole);
        REQUIRE(chown(file.c_str(), 12345, 12345) == 0);
        CHECK_THROWS_WITH(join(name), ContainsSubstring("belongs to user 12345"));
        CHECK_THROWS_AS(LedgerView(name), LedgerError);
    }
    std::filesystem::remove(file);

    // One whose maker died before it was whole is made anew.
    std::ofstream(file).close();
    join(name);
    write(std::string(whole.size(), '\0'));
    join(name);
    CHECK_FALSE(exists(name));
}

TEST_CASE("a ledger whose processes are all dead serves the next one, with any limit, or is removed",
          "[ledger][processes]") {
    const std::string name = fresh_name("dead");
    for (const bool again : {true, false}) {
        Other other([&](Other& parent) {
            SharedMemoryPool pool(16 * page, host_driver(), {}, name);
            pool.register_model("chat", mib)->allocate(page);
            parent.turn();
        });
        other.turn();
        CHECK_THROWS_AS(SharedMemoryPool(99 * page, host_driver(), {}, name), InvalidArgument);
        other.end();
        CHECK(exists(name));
        if (again) SharedMemoryPool(99 * page, host_driver(), {}, name);
        const std::vector<std::string> names = LedgerView::names();
        CHECK(std::count(names.begin(), names.end(), name) == 0);
        CHECK_FALSE(exists(name));
    }
}

TEST_CASE("a ledger takes so many processes and no more", "[ledger][processes][bad_input]") {
    const std::string name = fresh_name("full");
    std::vector<std::unique_ptr<SharedMemoryPool>> pools;
    for (std::uint32_t i = 0; i < max_ledger_members; ++i) {
        pools.push_back(std::make_unique<SharedMemoryPool>(16 * page, host_driver(), PoolOptions{}, name));
    }
    CHECK_THROWS_WITH(SharedMemoryPool(16 * page, host_driver(), {}, name), ContainsSubstring("full"));
    pools.pop_back();
    CHECK_NOTHROW(SharedMemoryPool(16 * page, host_driver(), {}, name));
    pools.clear();
    CHECK_FALSE(exists(name));
}

}  // namespace
}  // namespace elastikv::testing
