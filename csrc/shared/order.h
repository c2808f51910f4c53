// What a model is ordered to do from outside: to sleep, or to wake.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "driver/fork_guard.h"
#include "shared/ledger.h"

namespace elastikv {

// In the hands of the model's process until it says how it went, once; what comes after that is ignored. Thread safe:
// the ledger's lock decides.
class Order {
  public:
    Order(std::shared_ptr<Ledger> ledger, Ledger::ClientId client, LedgerOrder order)
        : ledger_(std::move(ledger)), client_(client), order_(order) {}
    // Refuses what nobody has answered.
    ~Order() { refuse("its program let the order go"); }  // not in a forked child, whose order it isn't
    Order(const Order&) = delete;
    Order& operator=(const Order&) = delete;

    LedgerOrderKind kind() const { return order_.kind; }
    // Those who gave the order are woken.
    void done() noexcept { settle(order_obeyed, ""); }
    void refuse(const std::string& why) noexcept { settle(order_refused, why); }

  private:
    void settle(LedgerOrderResult result, const std::string& why) noexcept {
        if (!process_.forked()) ledger_->settle_order(client_, order_.number, result, why);
    }

    const ProcessGuard process_;
    const std::shared_ptr<Ledger> ledger_;
    const Ledger::ClientId client_;
    const LedgerOrder order_;
};

// Called on the thread that serves other processes, with no lock held: it passes the order on and returns soon.
using OrderCallback = std::function<void(const std::shared_ptr<Order>&)>;

}  // namespace elastikv
