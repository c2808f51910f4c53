#include "shared/ledger_membership.h"

#include <exception>
#include <future>
#include <new>
#include <system_error>
#include <utility>

#include "shared/futex.h"
#include "shared/ledger_segment.h"

namespace elastikv {

LedgerMembership::LedgerMembership(const std::string& name, Bytes limit, const Capabilities& device, Serve serve)
    : state_(std::make_shared<State>()) {
    state_->name = name;
    state_->serve = std::move(serve);
    LedgerSegment::join(name, limit, device, [&](const LedgerSegment::Table& table, bool) {
        state_->ledger = std::make_shared<Ledger>(table);
        state_->ledger->agree_on(name, limit);
        std::promise<void> joined;
        auto told = joined.get_future();
        try {
            thread_ = std::thread([state = state_, &joined] {
                try {
                    state->index = state->ledger->enter_member();
                } catch (...) {
                    joined.set_exception(std::current_exception());
                    return;
                }
                joined.set_value();
                listen(state);
            });
        } catch (const std::system_error& error) {
            throw LedgerError("ledger '" + name + "': no thread to listen by: " + error.what());
        }
        try {
            told.get();
        } catch (...) {
            thread_.join();
            throw;
        }
    });
}

LedgerMembership::~LedgerMembership() {
    if (process_.forked()) {
        // Neither join nor detach, see Worker::abandon. The segment is the parent's affair.
        new (&thread_) std::thread();
        return;
    }
    state_->stopping.store(true, std::memory_order_release);
    state_->ledger->nudge(state_->index);
    if (thread_.get_id() == std::this_thread::get_id()) {
        thread_.detach();  // it dropped the last owner itself, and leaves as soon as it is back in listen()
    } else {
        thread_.join();
    }
}

void LedgerMembership::listen(const std::shared_ptr<State>& state) {
    Ledger& ledger = *state->ledger;
    while (!state->stopping.load(std::memory_order_acquire)) {
        const std::optional<LedgerRequest> request = ledger.next_request(state->index);
        if (!request) continue;
        state->serve(*request);
        ledger.answer(state->index, request->number);
    }
    ledger.leave_member(state->index);
    LedgerSegment::remove_if(state->name, [&](const LedgerSegment::Table&) { return ledger.members() == 0; });
}

}  // namespace elastikv
