// Orders to models from outside: who is told, who waits, and what becomes of orders that nobody obeys.
#include <unistd.h>

#include <atomic>
#include <future>
#include <mutex>
#include <semaphore>
#include <thread>

#include "shared/ledger_view.h"
#include "shared/shared_memory_pool.h"
#include "support/child.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

constexpr std::uint64_t long_enough = 60'000'000'000;

// Another one each time: a model of the section before may still be on its way out, held by who passes orders on.
std::string fresh_name(const char* of) {
    static std::atomic<int> count{0};
    return "test-orders-" + std::string(of) + "-" + std::to_string(getpid()) + "-" + std::to_string(count++);
}

struct Shared {
    explicit Shared(const char* of) : name(fresh_name(of)), pool(16 * MiB, host_driver(), {}, name) {
        model = pool.register_model("chat", 16 * MiB);
    }
    std::string name;
    SharedMemoryPool pool;
    ModelPtr model;
};

std::string refusal(const LedgerView& view, LedgerOrderKind kind = order_sleep) {
    try {
        view.order("chat", {}, kind, long_enough, {});
    } catch (const LedgerError& error) {
        return error.what();
    }
    return "";
}

}  // namespace

TEST_CASE("an order is passed on, and returns once it is done", "[orders]") {
    Shared shared("done");
    const LedgerView view(shared.name);
    // A thread sanitizer does not see what orders whom through two mappings of the same memory.
    std::mutex mutex;
    std::vector<LedgerOrderKind> told;
    shared.model->account()->set_order_callback([&](const std::shared_ptr<Order>& order) {
        {
            const std::lock_guard lock(mutex);
            told.push_back(order->kind());
        }
        order->done();
        order->refuse("too late");
    });
    view.order("chat", std::nullopt, order_sleep, long_enough, {});
    view.order("chat", std::nullopt, order_wake, long_enough, {});
    view.order("chat", static_cast<std::uint32_t>(getpid()), order_wake, long_enough, {});
    const std::lock_guard lock(mutex);
    REQUIRE(told == std::vector{order_sleep, order_wake, order_wake});
}

TEST_CASE("who is ordered may take its time, and the last order counts", "[orders]") {
    Shared shared("later");
    const LedgerView view(shared.name);
    std::promise<std::shared_ptr<Order>> first;
    std::atomic<int> told{0};
    shared.model->account()->set_order_callback([&](const std::shared_ptr<Order>& order) {
        if (told++ == 0) {
            first.set_value(order);
        } else {
            order->done();
        }
    });
    std::string refused;
    std::thread person([&] {
        try {
            view.order("chat", {}, order_sleep, long_enough, {});
        } catch (const LedgerError& error) {
            refused = error.what();
        }
    });
    const std::shared_ptr<Order> kept = first.get_future().get();
    bool overtaken = false;
    SECTION("it is done on another thread") { kept->done(); }
    SECTION("a later one is done first, and settles both") {
        view.order("chat", {}, order_wake, long_enough, {});
        kept->refuse("nobody reads this");
        overtaken = true;
    }
    person.join();
    CHECK((refused.find("another order came after it") != std::string::npos) == overtaken);
    CHECK(refused.empty() != overtaken);
}

TEST_CASE("refusals say why", "[orders]") {
    Shared shared("refused");
    const LedgerView view(shared.name);
    REQUIRE_THROWS_AS(view.order("chat", {}, order_sleep, long_enough, {}), InvalidArgument);
    REQUIRE_THROWS_AS(view.order("nobody", {}, order_sleep, long_enough, {}), ModelNotFound);
    const AccountPtr account = shared.model->account();
    account->set_order_callback([](const std::shared_ptr<Order>& order) { order->refuse("it is busy"); });
    REQUIRE(refusal(view).find("does not sleep: it is busy") != std::string::npos);
    account->set_order_callback([](const std::shared_ptr<Order>& order) { order->refuse(std::string(1000, 'x')); });
    REQUIRE(refusal(view, order_wake).find(std::string(ledger_reason_size - 1, 'x')) != std::string::npos);
    account->set_order_callback([](const std::shared_ptr<Order>&) { throw std::runtime_error("it threw"); });
    REQUIRE(refusal(view).find("it threw") != std::string::npos);
    account->set_order_callback([](const std::shared_ptr<Order>&) {});
    REQUIRE(refusal(view).find("let the order go") != std::string::npos);
    account->set_order_callback(nullptr);
    REQUIRE_THROWS_AS(view.order("chat", {}, order_sleep, long_enough, {}), InvalidArgument);
}

TEST_CASE("an order is passed on where what else is asked for fails", "[orders]") {
    class Failing final : public IdleHolder {
      public:
        Bytes release_idle(Bytes) override { throw PoolClosed("its cache is gone"); }
    };
    const std::string name = fresh_name("beside");
    const auto budget = PhysicalBudget::join(name, 16 * MiB, host_driver()->capabilities());
    const AccountPtr account = budget->open("chat");
    const auto holder = std::make_shared<Failing>();
    account->add_idle_holder(holder);
    account->set_order_callback([](const std::shared_ptr<Order>& order) { order->done(); });
    const std::uint32_t number = budget->ledger()->give_order(account->id(), order_sleep);
    REQUIRE(number != 0);
    LedgerRequest request;
    request.what = ask_trim | ask_orders;
    (void)budget->ledger()->ask(0, request);
    const auto outcome = budget->ledger()->await_order(account->id(), {order_sleep, number}, long_enough);
    REQUIRE(outcome.has_value());
    CHECK(outcome->result == order_obeyed);
}

TEST_CASE("an order that another kind replaced is not told the other's result", "[orders]") {
    const auto budget = PhysicalBudget::join(fresh_name("replaced"), 16 * MiB, host_driver()->capabilities());
    const AccountPtr account = budget->open("chat");
    Ledger& orders = *budget->ledger();
    orders.take_orders(account->id(), true);
    const std::uint32_t slept = orders.give_order(account->id(), order_sleep);
    const std::uint32_t again = orders.give_order(account->id(), order_sleep);
    orders.settle_order(account->id(), again, order_obeyed, "");
    CHECK(orders.await_order(account->id(), {order_sleep, slept}, 0)->result == order_obeyed);  // it does sleep
    const std::uint32_t woke = orders.give_order(account->id(), order_wake);
    orders.settle_order(account->id(), woke, order_obeyed, "");
    CHECK(orders.await_order(account->id(), {order_wake, woke}, 0)->result == order_obeyed);
    const auto outcome = orders.await_order(account->id(), {order_sleep, again}, 0);
    REQUIRE(outcome.has_value());
    CHECK(outcome->result == order_refused);
    CHECK(outcome->why == "another order came after it");
}

TEST_CASE("a forked child that drops an order leaves it to its parent", "[orders][fork]") {
    Shared shared("forked");
    const LedgerView view(shared.name);
    std::promise<std::shared_ptr<Order>> given;
    shared.model->account()->set_order_callback([&](const std::shared_ptr<Order>& order) { given.set_value(order); });
    std::thread person([&] { view.order("chat", {}, order_sleep, long_enough, {}); });
    std::shared_ptr<Order> order = given.get_future().get();
    CHECK(in_child([&] {
              order.reset();
              return 0;
          }) == 0);
    order->done();
    person.join();
}

TEST_CASE("a wait for an order ends with its time, when it is called off, and with the model", "[orders]") {
    auto shared = std::make_unique<Shared>("waits");
    // A second pool keeps the ledger, and a later model may get the entry of the first.
    SharedMemoryPool beside(16 * MiB, host_driver(), {}, shared->name);
    const LedgerView view(shared->name);
    std::vector<std::shared_ptr<Order>> kept;
    std::counting_semaphore<> passed_on{0};
    shared->model->account()->set_order_callback([&](const std::shared_ptr<Order>& order) {
        kept.push_back(order);
        passed_on.release();
    });
    REQUIRE_THROWS_AS(view.order("chat", {}, order_sleep, 0, {}), LedgerError);
    passed_on.acquire();  // each by itself: of two at once only the later one is passed on
    int asked = 0;
    REQUIRE_THROWS_AS(view.order("chat", {}, order_sleep, long_enough, [&] { return ++asked == 2; }), WaitCancelled);
    passed_on.acquire();
    std::string why;
    std::thread person([&] { why = refusal(view); });
    passed_on.acquire();
    shared.reset();
    const ModelPtr next = beside.register_model("chat", 16 * MiB);
    person.join();
    CHECK(why.find("it has ended") != std::string::npos);
    kept.clear();  // settles nothing of the one that has the entry now
    next->account()->set_order_callback([](const std::shared_ptr<Order>& order) { order->done(); });
    view.order("chat", {}, order_sleep, long_enough, {});
}

}  // namespace elastikv::testing
