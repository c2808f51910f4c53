// Blocks in their lists, at random against a plain model.
#include <map>
#include <set>

#include "catch.h"
#include "pool/block_map.h"
#include "support/random.h"

namespace elastikv::testing {
namespace {

void map_all(BlockMap& map, const std::vector<std::uint64_t>& extents) {
    for (auto extent = extents.rbegin(); extent != extents.rend(); ++extent) map.map(*extent);
}

std::vector<BlockId> take(BlockMap& map, std::size_t count) {
    std::vector<BlockId> ids(count);
    map.take(ids);
    return ids;
}

TEST_CASE("block map: new extents are those of the lowest addresses", "[blocks]") {
    BlockMap map(10, 4);  // 4, 4 and 2 blocks
    CHECK(map.extents_for(1) == std::vector<std::uint64_t>{0});
    CHECK(map.extents_for(4) == std::vector<std::uint64_t>{0});
    CHECK(map.extents_for(9) == std::vector<std::uint64_t>{0, 1, 2});
    map_all(map, {0, 1});
    CHECK(map.extents_for(2) == std::vector<std::uint64_t>{2});
    map.unmap(0);
    CHECK(map.extents_for(5) == std::vector<std::uint64_t>{0, 2});
    CHECK(map.extents_for(1, std::vector<std::uint64_t>{2}) == std::vector<std::uint64_t>{2});
    CHECK(map.extents_for(3, std::vector<std::uint64_t>{2}) == std::vector<std::uint64_t>{0});  // 2 would stay empty
    CHECK(map.extents_for(6, std::vector<std::uint64_t>{2}) == std::vector<std::uint64_t>{0, 2});
    CHECK(map.extents_for(1, std::vector<std::uint64_t>{0, 2}) == std::vector<std::uint64_t>{0});
    CHECK(map.check().empty());
}

TEST_CASE("block map: new blocks go to the fullest extent that has room", "[blocks]") {
    BlockMap map(12, 4);
    map_all(map, {0, 1, 2});
    const std::vector<BlockId> ids = take(map, 12);
    std::vector<std::uint64_t> emptied;
    CHECK_FALSE(map.drop(std::vector<BlockId>{0, 1, 2, 5, 8, 9}, emptied));
    CHECK(emptied.empty());
    CHECK(take(map, 4) == std::vector<BlockId>{5, 8, 9, 0});
    CHECK(map.check().empty());
}

TEST_CASE("block map: a drop is all or nothing, and can be undone", "[blocks]") {
    BlockMap map(8, 4);
    map_all(map, {0, 1});
    const std::vector<BlockId> ids = take(map, 5);
    std::vector<std::uint64_t> emptied;
    CHECK(map.drop(std::vector<BlockId>{0, 1, 0}, emptied) == 2U);
    CHECK(map.drop(std::vector<BlockId>{0, -1}, emptied) == 1U);
    CHECK(map.drop(std::vector<BlockId>{0, 8}, emptied) == 1U);
    CHECK(map.drop(std::vector<BlockId>{7}, emptied) == 0U);
    CHECK(map.held() == 5);
    CHECK(map.check().empty());

    CHECK(map.touch(std::vector<BlockId>{0, 0, 6}) == 2U);
    CHECK(map.references(0) == 1);
    CHECK_FALSE(map.touch(std::vector<BlockId>{0}));
    CHECK_FALSE(map.drop(std::vector<BlockId>{0, 1, 2, 3, 0}, emptied));
    CHECK(emptied == std::vector<std::uint64_t>{0});
    CHECK(map.held() == 1);
    map.undo_drop(std::vector<BlockId>{0, 1, 2, 3, 0});
    CHECK(map.held() == 5);
    CHECK(map.references(0) == 2);
    CHECK(map.check().empty());
}

TEST_CASE("block map: at random, it counts as a plain map does", "[blocks][random]") {
    const std::uint64_t seed = test_seed(20250101);
    CAPTURE(seed);
    Random random(seed);
    for (const std::uint64_t per_extent : {1U, 3U, 64U, 150U}) {
        const std::uint64_t blocks = 5 * per_extent + 1 + random.below(per_extent);
        BlockMap map(blocks, per_extent);
        std::map<BlockId, std::uint32_t> plain;
        const auto random_ids = [&](std::size_t most) {
            std::vector<BlockId> ids;
            for (std::size_t i = random.below(most + 1); i > 0; --i) {
                if (plain.empty() || random.one_in(40)) {
                    ids.push_back(static_cast<BlockId>(random.below(blocks + 2)) - 1);
                } else {
                    auto it = plain.lower_bound(static_cast<BlockId>(random.below(blocks)));
                    ids.push_back(it == plain.end() ? plain.begin()->first : it->first);
                }
            }
            return ids;
        };
        for (int step = 0; step < 4000; ++step) {
            CAPTURE(per_extent, step);
            if (random.one_in(2)) {
                const std::uint64_t count = random.below(std::min<std::uint64_t>(blocks - plain.size(), 20) + 1);
                std::vector<std::uint64_t> preferred;
                for (std::uint64_t extent = 0; extent < map.extents(); ++extent) {
                    if (!map.is_mapped(extent) && random.one_in(4)) preferred.push_back(extent);
                }
                if (count > map.free_mapped()) map_all(map, map.extents_for(count - map.free_mapped(), preferred));
                for (const BlockId id : take(map, count)) REQUIRE(plain.emplace(id, 1).second);
            } else if (random.one_in(4)) {
                const std::vector<BlockId> ids = random_ids(6);
                bool fine = true;
                for (const BlockId id : ids) fine = fine && plain.count(id) != 0;
                REQUIRE(!map.touch(ids).has_value() == fine);
                if (fine) {
                    for (const BlockId id : ids) ++plain[id];
                }
            } else {
                const std::vector<BlockId> ids = random_ids(20);
                auto after = plain;
                bool fine = true;
                for (const BlockId id : ids) {
                    auto it = after.find(id);
                    fine = fine && it != after.end();
                    if (fine && --it->second == 0) after.erase(it);
                }
                std::vector<std::uint64_t> emptied;
                REQUIRE(!map.drop(ids, emptied).has_value() == fine);
                if (fine && random.one_in(5)) {
                    map.undo_drop(ids);
                } else if (fine) {
                    plain = after;
                    for (const std::uint64_t extent : emptied) map.unmap(extent);
                }
            }
            std::set<std::uint64_t> extents;
            for (const auto& [id, count] : plain) {
                REQUIRE(map.references(id) == count);
                extents.insert(map.extent_of(id));
            }
            REQUIRE(map.held() == plain.size());
            REQUIRE(map.mapped_extents() == extents.size());
            if (const std::string wrong = map.check(); !wrong.empty()) FAIL(wrong);
        }
    }
}

}  // namespace
}  // namespace elastikv::testing
