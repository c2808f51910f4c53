// What a Timeline records: the books of the pool at each instant, bounded, and nothing after stop().
#include <limits>
#include <thread>

#include "shared/timeline.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

using namespace std::chrono_literals;

constexpr std::chrono::duration<double> fast{1e-5};
constexpr std::chrono::duration<double> once{3600};  // one reading at the start, one at stop()

struct TimelineFixture {
    std::shared_ptr<HostDriver> host = std::make_shared<HostDriver>();
    Bytes page = host->capabilities().granularity;
    std::shared_ptr<SharedMemoryPool> shared =
        std::make_shared<SharedMemoryPool>(64 * page, host, PoolOptions{.park_limit = 4 * page});
    ModelPtr chat = shared->register_model("chat", 256 * page);
    ModelPtr code = shared->register_model("code", 256 * page);
};

TEST_CASE("the last instant of a timeline is what the pool's books say", "[timeline]") {
    TimelineFixture at;
    Timeline timeline(at.shared, once);
    (void)at.chat->allocate(3 * at.page);
    const Address code = at.code->allocate(2 * at.page);
    at.code->deallocate(code - at.code->base_address(), at.page);
    timeline.stop();
    CHECK_FALSE(timeline.running());
    timeline.stop();

    const Timeline::Recording recording = timeline.recording();
    REQUIRE(recording.models == std::vector<std::string>{"chat", "code"});
    REQUIRE(recording.instants.size() == 2);
    REQUIRE(recording.instants.back().end == recording.samples.size());
    CHECK(recording.instants.back().physical_limit == 64 * at.page);
    const TimelineSample& last_chat = recording.samples.at(2);
    const TimelineSample& last_code = recording.samples.at(3);
    CHECK(last_chat.model == 0);
    CHECK(last_chat.used == 3 * at.page);
    CHECK(last_code.used == at.page);
    const MemoryStats stats = at.code->stats();
    CHECK(last_code.parked == stats.parked);
    CHECK(last_code.stranded == stats.stranded);
    CHECK(last_code.retiring == stats.retiring);
    CHECK(last_code.seconds == recording.instants.back().seconds);
}

TEST_CASE("a long timeline is thinned out and covers the whole run", "[timeline]") {
    TimelineFixture at;
    (void)at.chat->allocate(at.page);
    Timeline timeline(at.shared, fast, 8);
    while (timeline.recording().interval < 16 * fast.count()) std::this_thread::sleep_for(100us);
    timeline.stop();
    const Timeline::Recording recording = timeline.recording();
    REQUIRE(recording.instants.size() <= 8);
    CHECK(recording.instants.front().seconds < recording.instants.back().seconds);
    std::size_t begin = 0;
    double before = -1;
    for (const TimelineInstant& instant : recording.instants) {
        REQUIRE(instant.end - begin == 2);
        CHECK(instant.seconds > before);
        before = instant.seconds;
        for (; begin < instant.end; ++begin) CHECK(recording.samples.at(begin).seconds == instant.seconds);
    }
    CHECK(begin == recording.samples.size());
}

TEST_CASE("a model that is unregistered while its memory lives stays on the timeline", "[timeline]") {
    TimelineFixture at;
    auto region = at.chat->reserve(at.page);
    region->claim(0, at.page, {});
    at.shared->unregister_model("chat");
    const ModelPtr again = at.shared->register_model("chat", 16 * at.page);
    (void)again->allocate(2 * at.page);
    Timeline timeline(at.shared, once);
    timeline.stop();
    const Timeline::Recording recording = timeline.recording();
    Bytes chat = 0;
    for (std::size_t i = 0; i < recording.instants.front().end; ++i) {
        if (recording.models.at(recording.samples.at(i).model) == "chat") chat += recording.samples.at(i).used;
    }
    CHECK(chat == 3 * at.page);
}

TEST_CASE("a timeline keeps its pool until it is stopped, and records beside working threads", "[timeline]") {
    TimelineFixture at;
    const std::weak_ptr<SharedMemoryPool> watched = at.shared;
    Timeline timeline(at.shared, fast);
    at.shared.reset();
    CHECK_FALSE(watched.expired());
    std::vector<std::thread> threads;
    for (const ModelPtr& model : {at.chat, at.code}) {
        threads.emplace_back([model, page = at.page] {
            for (int i = 0; i < 2000; ++i) {
                const Address got = model->allocate(page);
                model->deallocate(got - model->base_address(), page);
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    timeline.stop();
    CHECK(watched.expired());
    for (const TimelineSample& sample : timeline.recording().samples) CHECK(sample.used <= at.page);
}

TEST_CASE("a timeline refuses intervals and sizes that are none", "[timeline]") {
    TimelineFixture at;
    for (const double seconds : {0.0, -1.0, 1e9, std::numeric_limits<double>::quiet_NaN()}) {
        CHECK_THROWS_AS(Timeline(at.shared, std::chrono::duration<double>(seconds)), InvalidArgument);
    }
    CHECK_THROWS_AS(Timeline(at.shared, once, 1), InvalidArgument);
}

}  // namespace
}  // namespace elastikv::testing
