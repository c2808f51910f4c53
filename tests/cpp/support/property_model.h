// What a pool should hold, kept as plainly as possible, and random operations on it.
#pragma once

#include <algorithm>
#include <map>
#include <sstream>
#include <string>
#include <variant>
#include <vector>

#include "driver/vmm_driver.h"
#include "support/random.h"

namespace elastikv::testing {

// Who owns each byte: an array with one entry a grain. A grain is one byte where pages are small, so that everything is
// exact to the byte; on a GPU, whose pages are 2 MiB, it is a few hundred, and all offsets and sizes are multiples of
// it.
struct PlainModel {
    static constexpr std::uint8_t nobody = 0;

    PlainModel(Bytes capacity_, Bytes grain_) : capacity(capacity_), grain(grain_), owner(capacity_ / grain_, nobody) {}

    bool all_live(ByteRange r) const {
        return std::none_of(at(r.begin), at(r.end), [](std::uint8_t who) { return who == nobody; });
    }
    bool any_live(ByteRange r) const {
        return std::any_of(at(r.begin), at(r.end), [](std::uint8_t who) { return who != nobody; });
    }
    Bytes live_in(ByteRange r) const {
        return grain *
               static_cast<Bytes>(std::count_if(at(r.begin), at(r.end), [](auto who) { return who != nobody; }));
    }
    void allocate(ByteRange r, std::uint8_t who) {
        std::fill(at(r.begin), at(r.end), who);
        live += r.size();
    }
    void free(ByteRange r) {
        live -= live_in(r);
        std::fill(at(r.begin), at(r.end), nobody);
        stamps.erase(stamps.lower_bound(r.begin), stamps.lower_bound(r.end));
    }
    // Those who own bytes of the range, each once.
    std::vector<std::uint8_t> owners(ByteRange r) const {
        std::vector<std::uint8_t> found;
        for (std::uint8_t who = 1; who < 8; ++who) {
            if (std::find(at(r.begin), at(r.end), who) != at(r.end)) found.push_back(who);
        }
        return found;
    }
    // From a random place on, the next run of bytes that are all live, or all free; cut to `most`.
    ByteRange run(Random& random, bool of_live, Bytes most) const {
        const auto wanted = [&](std::uint8_t who) { return (who != nobody) == of_live; };
        auto begin = std::find_if(at(random.below(capacity / grain) * grain), owner.end(), wanted);
        if (begin == owner.end()) begin = std::find_if(owner.begin(), owner.end(), wanted);
        const auto reach = std::min<std::ptrdiff_t>(owner.end() - begin, static_cast<std::ptrdiff_t>(most / grain));
        const auto end = std::find_if_not(begin, begin + reach, wanted);
        return {grain * static_cast<Bytes>(begin - owner.begin()), grain * static_cast<Bytes>(end - owner.begin())};
    }

    struct Stamp {
        std::uint8_t value;
        std::uint8_t owner;
    };

    Bytes capacity;
    Bytes grain;
    std::vector<std::uint8_t> owner;
    std::map<Bytes, Stamp> stamps;  // content that is known, by offset
    std::vector<ByteRange> gated;   // released, and not to be taken up before the gate of the same index opens
    Bytes live = 0;

  private:
    std::vector<std::uint8_t>::iterator at(Bytes offset) {
        return owner.begin() + static_cast<std::ptrdiff_t>(offset / grain);
    }
    std::vector<std::uint8_t>::const_iterator at(Bytes offset) const {
        return owner.begin() + static_cast<std::ptrdiff_t>(offset / grain);
    }
};

struct Allocate {
    ByteRange bytes;
    bool zero;
    bool open_ended;
    std::uint8_t owner;
};
struct Free {
    ByteRange bytes;
    bool within;
    bool gated;
};
struct Prefetch {
    ByteRange bytes;
};
struct Trim {
    Bytes wanted;
};
struct Compact {};
struct Drain {};
struct Query {
    ByteRange bytes;
};
struct HoldFences {};
struct LetPass {};
struct OpenGate {};
struct FailCall {
    std::uint64_t n;
    StatusCode code;
};
using Operation =
    std::variant<Allocate, Free, Prefetch, Trim, Compact, Drain, Query, HoldFences, LetPass, OpenGate, FailCall>;

struct PropertySetup {
    Bytes pages = 48;
    Bytes grain = 1;
    std::uint8_t owners = 1;  // streams that use the memory
    bool faults = false;
    bool held_fences = false;
    bool gates = false;
};

inline Operation random_operation(Random& random, const PlainModel& model, const PropertySetup& setup, Bytes page) {
    const Bytes most = random.one_in(6) ? 12 * page : 2 * page;
    const auto anywhere = [&] {
        const Bytes begin = random.below(model.capacity / model.grain) * model.grain;
        const Bytes room = (std::min(most, model.capacity - begin)) / model.grain;
        return ByteRange{begin, begin + (1 + random.below(room)) * model.grain};
    };
    const auto cut = [&](ByteRange run) {  // a part of the run that may start behind its begin
        if (run.empty() || random.one_in(2)) return run;
        const Bytes grains = run.size() / model.grain;
        const Bytes skip = random.below(grains);
        return ByteRange{run.begin + skip * model.grain,
                         run.begin + (skip + 1 + random.below(grains - skip)) * model.grain};
    };
    const bool wild = random.one_in(10);  // anywhere, whether or not that makes sense
    switch (random.below(64)) {
        case 0: return Compact{};
        case 1: return Drain{};
        case 2:
        case 3: return Trim{random.one_in(2) ? ~Bytes{0} : random.below(8) * page};
        case 4:
        case 5:
        case 6: return Prefetch{anywhere()};
        case 7:
        case 8:
        case 9:
        case 10: return Query{anywhere()};
        case 11:
        case 12:
            if (setup.held_fences) return HoldFences{};
            [[fallthrough]];
        case 13:
        case 14:
        case 15:
            if (setup.held_fences) return LetPass{};
            [[fallthrough]];
        case 16:
        case 17:
            if (setup.gates) return OpenGate{};
            [[fallthrough]];
        case 18:
        case 19:
        case 20:
        case 21:
            if (setup.faults) {
                return FailCall{1 + random.below(10),
                                random.one_in(2) ? StatusCode::failed : StatusCode::out_of_memory};
            }
            [[fallthrough]];
        default: {
            if (random.one_in(2)) {
                const ByteRange bytes = wild ? anywhere() : cut(model.run(random, false, most));
                const auto owner = static_cast<std::uint8_t>(1 + random.below(setup.owners));
                return Allocate{bytes, random.one_in(3), random.one_in(4), owner};
            }
            const bool within = random.one_in(8);
            const ByteRange bytes = wild || within ? anywhere() : cut(model.run(random, true, most));
            return Free{bytes, within, setup.gates && random.one_in(12)};
        }
    }
}

inline std::string describe(const Operation& operation) {
    std::ostringstream text;
    const auto range = [](ByteRange r) { return " [" + std::to_string(r.begin) + ", " + std::to_string(r.end) + ")"; };
    struct {
        std::ostringstream& out;
        decltype(range)& show;
        void operator()(const Allocate& o) const {
            out << "allocate" << show(o.bytes) << (o.zero ? " zero" : "") << (o.open_ended ? " open-ended" : "")
                << " owner " << int{o.owner};
        }
        void operator()(const Free& o) const {
            out << "free" << show(o.bytes) << (o.within ? " within" : "") << (o.gated ? " gated" : "");
        }
        void operator()(const Prefetch& o) const { out << "prefetch" << show(o.bytes); }
        void operator()(const Trim& o) const { out << "trim " << o.wanted; }
        void operator()(const Compact&) const { out << "compact"; }
        void operator()(const Drain&) const { out << "drain"; }
        void operator()(const Query& o) const { out << "query" << show(o.bytes); }
        void operator()(const HoldFences&) const { out << "hold fences"; }
        void operator()(const LetPass&) const { out << "let pass"; }
        void operator()(const OpenGate&) const { out << "open a gate"; }
        void operator()(const FailCall& o) const { out << "fail call " << o.n << " with " << name_of(o.code); }
    } visitor{text, range};
    std::visit(visitor, operation);
    return text.str();
}

}  // namespace elastikv::testing
