// The reclaim ladder where the ledger has room: memory came back meanwhile, or it is the device that has none.
#include <functional>
#include <optional>
#include <string>
#include <utility>

#include "shared/shared_memory_pool.h"
#include "support/pool_fixture.h"
#include "support/watching_driver.h"

namespace elastikv::testing {
namespace {

// Keeps memory for use later, until somebody asks.
class Keeper final : public IdleHolder {
  public:
    Keeper(ModelPtr model, Bytes size) : model_(std::move(model)), size_(size) { model_->allocate(size); }
    Bytes release_idle(Bytes) override {
        ++asked;
        if (size_ > 0) model_->deallocate(0, size_);
        return std::exchange(size_, 0);
    }

    int asked = 0;

  private:
    const ModelPtr model_;
    Bytes size_;
};

std::shared_ptr<Keeper> keeper_of(const ModelPtr& model, Bytes size) {
    auto keeper = std::make_shared<Keeper>(model, size);
    model->account()->add_idle_holder(keeper);
    return keeper;
}

// A device with less memory than the ledger's limit.
class SmallDevice final : public ForwardingDriver {
  public:
    SmallDevice(std::shared_ptr<WatchingDriver> watched, Bytes size)
        : ForwardingDriver(watched), watched_(std::move(watched)), size_(size) {}
    Status create(Bytes size, ExtentHandle& out) noexcept override {
        if (watched_->physical() + size > size_) return {StatusCode::out_of_memory, DriverCall::create, 0};
        return ForwardingDriver::create(size, out);
    }

  private:
    Status forward(DriverCall, Forwarded& go) noexcept override { return go(); }

    const std::shared_ptr<WatchingDriver> watched_;
    const Bytes size_;
};

TEST_CASE("memory that comes back while a claim fails is taken before anyone is asked", "[shared][ladder]") {
    const auto driver = std::make_shared<WatchingDriver>(std::make_shared<HostDriver>());
    const Bytes page = driver->capabilities().granularity;
    SharedMemoryPool shared(8 * page, driver);
    const auto keeper = keeper_of(shared.register_model("keeping", MiB), 4 * page);
    const ModelPtr busy = shared.register_model("busy", MiB);
    const ModelPtr asker = shared.register_model("asker", MiB);
    busy->allocate(2 * page);
    const auto region = asker->reserve(8 * page);
    bool back = false;
    driver->before = [&](DriverCall call) {
        // The asker's second extent did not fit, and it undoes the first. (Not at release, which the driver counts.)
        if (call != DriverCall::unmap || std::exchange(back, true)) return;
        busy->deallocate(0, 2 * page);
        busy->account()->reclaim(2 * page, false);
    };
    region->claim(0, 4 * page, {.extents = {.largest = 2 * page}});
    CHECK(back);
    CHECK(keeper->asked == 0);
    CHECK(busy->quota().charged == 0);
    CHECK(shared.global_stats().physical_usage == 8 * page);
}

// Calls the test before and after a request for room that may wait.
class Between final : public Budget {
  public:
    explicit Between(AccountPtr account) : account_(std::move(account)) {}
    bool try_charge(Bytes bytes) noexcept override { return account_->try_charge(bytes); }
    void refund(Bytes bytes) noexcept override { account_->refund(bytes); }
    bool try_pass_on(Bytes bytes, Budget& to) noexcept override { return account_->try_pass_on(bytes, to); }
    Bytes available() const noexcept override { return account_->available(); }
    bool in_demand() const noexcept override { return account_->in_demand(); }
    bool over_limit() const noexcept override { return account_->over_limit(); }
    Bytes make_room(Bytes wanted, bool wait, HandOver* handed) override {
        if (wait) before();
        const Bytes freed = account_->make_room(wanted, wait, handed);
        if (wait) after();
        return freed;
    }
    std::optional<Grant> wait_for_room(Bytes bytes, const WaitOptions& wait) override {
        return account_->wait_for_room(bytes, wait);
    }
    void add_idle_holder(const std::weak_ptr<IdleHolder>& holder) override { account_->add_idle_holder(holder); }
    std::string describe_holders() const override { return account_->describe_holders(); }
    void note_refusal() noexcept override { account_->note_refusal(); }

    std::function<void()> before, after;

  private:
    const AccountPtr account_;
};

TEST_CASE("room that was there and is gone again has not been asked for", "[shared][ladder]") {
    const auto host = std::make_shared<HostDriver>();
    const Bytes page = host->capabilities().granularity;
    SharedMemoryPool shared(8 * page, host);
    const auto keeper = keeper_of(shared.register_model("keeping", MiB), 4 * page);
    const ModelPtr rival = shared.register_model("rival", MiB);
    rival->allocate(4 * page);
    const auto budget = std::make_shared<Between>(shared.register_model("asker", MiB)->account());
    bool done = false;
    budget->before = [&] {
        if (!done) rival->deallocate(0, 4 * page);
    };
    budget->after = [&] {
        if (!std::exchange(done, true)) rival->allocate(4 * page);
    };
    VirtualMemoryPool pool(MiB, host, {}, budget);
    pool.allocate(0, 4 * page);
    CHECK(done);
    CHECK(keeper->asked == 1);
}

TEST_CASE("where the device lacks what the ledger has room for, those who keep memory are asked", "[shared][ladder]") {
    const auto driver = std::make_shared<WatchingDriver>(std::make_shared<HostDriver>());
    const Bytes page = driver->capabilities().granularity;
    SharedMemoryPool shared(64 * page, std::make_shared<SmallDevice>(driver, 4 * page));
    const auto keeper = keeper_of(shared.register_model("keeping", MiB), 4 * page);
    const ModelPtr asker = shared.register_model("asker", MiB);
    asker->allocate(3 * page);
    CHECK(keeper->asked == 1);
    CHECK(driver->physical() == 3 * page);
}

}  // namespace
}  // namespace elastikv::testing
